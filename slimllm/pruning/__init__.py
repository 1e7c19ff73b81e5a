"""The engine: the dense pass, the layer loop, the memory estimate, and the report of a run."""
