"""A card to compute with by hand, as it performs where every peak is reached and nothing is beside."""

from __future__ import annotations

from afd.planner.accelerators import Accelerator
from afd.planner.stages import Efficiencies, Transport

PERFECT = Efficiencies(memory=1, flops=1, link=1, overlap=1, imbalance=1, step_s=0, usable_memory=1)
IDEAL = Transport("ideal", 0, 1)
CARD = Accelerator(
    name="round numbers",
    bf16_flops=1e6,
    fp8_flops=2e6,
    memory_bytes_per_s=1e4,
    memory_bytes=1e6,
    link_bytes_per_s=1e3,
    nic_bytes_per_s=1e2,
    cards_per_server=2,
    dollars_per_hour=3600.0,
    source="none",
)
