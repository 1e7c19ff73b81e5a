"""Execution of the work: processes, memory, signals, progress, and storage of hidden states."""
