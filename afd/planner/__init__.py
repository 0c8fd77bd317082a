"""What decoding costs, which A:F ratio to run, and whether disaggregation pays: `afd plan`. Imports no torch."""
