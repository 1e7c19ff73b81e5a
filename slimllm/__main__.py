"""`python -m slimllm` is the same as `slimllm`."""

from slimllm.cli import main

main()
