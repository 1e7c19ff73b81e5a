"""Where and how the work runs: processes, memory, signals, progress, and the place of hidden states."""
