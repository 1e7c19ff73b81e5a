"""Families of models: the names inside them, one decoder layer at work, its slicing, the model without weights."""
