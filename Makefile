# make demo · make test: each sets itself up in a virtual environment inside the checkout; run again, it reuses it.
PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers
TRITON := .venv-triton
# NVIDIA's Python bindings of TensorRT, alone: which of their names and parameters the code may use.
TENSORRT_BINDINGS := $(addprefix build/tensorrt-bindings/,10.15.1.29 10.16.1.11 11.0.0.114 11.4.0.106)
BIN    := $(VENV)/bin
MODEL  := examples/needle/model

.PHONY: demo test test-triton test-peers test-tensorrt-api bench results gpu-check lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2
	$(MAKE) test-triton

# Against a real tritonserver, in an environment of its own; where none can be installed its tests are skipped by name.
test-triton: $(TRITON)/.installed
	$(TRITON)/bin/python -m pytest -o addopts="-ra --strict-markers" -n 2 --dist loadfile tests/serving

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest -o addopts="-ra --strict-markers" tests/peers

test-tensorrt-api: $(VENV)/.installed-test $(TENSORRT_BINDINGS)
	$(BIN)/python -m pytest tests/test_tensorrt_api.py

build/tensorrt-bindings/%: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --target $@.partial tensorrt_cu13_bindings==$*
	mv $@.partial $@

bench: $(PEERS)/.installed
	$(PEERS)/bin/python benchmarks/against_transformers.py --output docs/benchmarks/cpu-against-transformers.json

results: $(VENV)/.installed-demo
	$(BIN)/python -m benchmarks.results

# Runs in the machine's own Python, the one that has torch; DRY=--dry_run needs no GPU.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(DRY)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(PEERS) $(TRITON) build engines/needle-*

# Editable installs: the stamp depends on pyproject.toml alone, because code changes need no reinstall.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[plots]'
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(PEERS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --editable '.[peers]'
	touch $@

$(TRITON)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --editable '.[triton-test]'
	$(TRITON)/bin/python -m pip install --quiet --no-deps nvidia-pytriton==0.7.0 || echo "no tritonserver for this machine"
	touch $@
