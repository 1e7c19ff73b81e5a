"""Pruned models in formats of others: a stock architecture, padded, or GGUF."""
