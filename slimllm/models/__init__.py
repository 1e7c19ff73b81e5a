"""Model families, decoder layers and sub-layers, slicing of weights, and models without weights."""
