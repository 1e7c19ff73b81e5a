"""Throughput of pruning: measurements, counted work and plots of `slimllm bench`."""

from slimllm.experiments.bench.run import Setting, append_rows, measure

__all__ = ["Setting", "append_rows", "measure"]
