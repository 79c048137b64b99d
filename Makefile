# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps

.PHONY: demo test lint clean
demo: $(STAMPS)/demo
	$(BIN)/reft demo

test: $(STAMPS)/dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: any looser request resolves to gigabytes of CUDA packages.
$(STAMPS)/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf $(VENV) build *.egg-info
