"""Models on disk: readers of safetensors and GGUF, the native format, the writer, and the journal of a run."""
