"""Experiments of several runs: comparison of methods, sweep over ratios, and benchmark."""
