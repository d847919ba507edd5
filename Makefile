# Everything runs in .venv, which the first command makes. On a machine that brings its own PyTorch (a GPU machine), name
# its interpreter instead: make gpu PYTHON=python3
VENV := .venv
PYTHON ?= $(VENV)/bin/python
STAMP := $(VENV)/.installed
OUT ?= demo-out
GPU_OUT ?= gpu-out

.PHONY: demo test lint bench clean

$(STAMP): requirements/ci.txt pyproject.toml setup.py
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/ci.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps $$(sed -n 's/^# no-deps: //p' requirements/ci.txt)
	ATTANCHOR_BUILD_CUDA=0 $(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: $(STAMP)
	$(VENV)/bin/attanchor demo --output $(OUT)

test: $(STAMP) lint
	$(PYTHON) -m pytest -n 2 --dist loadgroup tests

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Everything that needs a GPU, into GPU_OUT; without one, a rehearsal at toy sizes. PART=1, 2 or 3 does a part of it.
.PHONY: gpu
gpu: $(if $(filter $(VENV)/%,$(PYTHON)),$(STAMP))
	$(PYTHON) -m benchmarks.gpu --output $(GPU_OUT) $(if $(PART),--part $(PART))

bench: $(if $(filter $(VENV)/%,$(PYTHON)),$(STAMP))
	$(PYTHON) -m pytest benchmarks --benchmark-enable

clean:
	rm -rf $(VENV) build *.egg-info attanchor_kernels/*.so $(OUT) $(GPU_OUT)
