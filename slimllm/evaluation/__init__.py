"""Measurements of a model, pruned or not: perplexity, tasks, and speed of generation."""
