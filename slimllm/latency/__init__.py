"""How fast models generate, dense and pruned in turn: what `slimllm latency` measures."""

from slimllm.latency.measure import Latency, Timed, measure_latency
from slimllm.latency.worker import Shape

__all__ = ["Latency", "Shape", "Timed", "measure_latency"]
