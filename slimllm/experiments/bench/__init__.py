"""Throughput of pruning: what `slimllm bench` measures, counts and draws."""

from slimllm.experiments.bench.run import Setting, append_rows, measure

__all__ = ["Setting", "append_rows", "measure"]
