"""A deployment simulated over time: queueing, ragged batches, jitter, failures and scaling."""

from afd.planner.simulation.outcome import Simulated
from afd.planner.simulation.run import simulate
from afd.planner.simulation.scenario import Conditions, Rate, Replay, Scaling, Scenario, Streams

__all__ = ["Conditions", "Rate", "Replay", "Scaling", "Scenario", "Simulated", "Streams", "simulate"]
