# `make test` and `make demo` on a fresh machine: environment, install, main job. Nothing is installed again until a pin or
# a package changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: test demo lint typecheck clean

test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

demo: $(READY)
	$(BIN)/prlhf demo --out runs/demo

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not follow the mapping of folders to packages, so an installed copy is checked.
typecheck: $(READY)
	rm -rf build/typed && $(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p prlhf

clean:
	rm -rf $(VENV) build dist *.egg-info
