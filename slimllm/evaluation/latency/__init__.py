"""Generation speed of dense and pruned models, measured in turns by `slimllm latency`."""

from slimllm.evaluation.latency.measure import Latency, Timed, measure_latency
from slimllm.evaluation.latency.worker import Shape

__all__ = ["Latency", "Shape", "Timed", "measure_latency"]
