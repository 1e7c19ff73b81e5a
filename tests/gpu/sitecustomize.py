"""Python imports this at its start, with this folder on PYTHONPATH: the simulated GPU, where it is asked for."""

import os

if os.environ.get("SIMULATED_CUDA") == "1":
    import simulated_cuda

    simulated_cuda.install()
