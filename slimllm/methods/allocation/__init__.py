"""Allocations: how many heads and channels each layer gives."""
