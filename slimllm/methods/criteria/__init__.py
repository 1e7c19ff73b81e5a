"""Criteria: which heads and channels of a sub-layer are removed."""
