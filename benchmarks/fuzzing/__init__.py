"""What benchmarks.fuzz throws at a mesh, and how it watches the mesh meanwhile."""
