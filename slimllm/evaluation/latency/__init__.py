"""How fast models generate, dense and pruned in turn: what `slimllm latency` measures."""

from slimllm.evaluation.latency.measure import Latency, Timed, measure_latency
from slimllm.evaluation.latency.worker import Shape

__all__ = ["Latency", "Shape", "Timed", "measure_latency"]
