PYTHON ?= python3.11
BIN := .venv/bin
# Engines of two workers would not fit into one GPU.
WORKERS ?= $(if $(wildcard /proc/driver/nvidia/version),0,2)

.PHONY: setup app test test-newest demo check bench format lock

setup: ; @PYTHON="$(PYTHON)" sh requirements/setup.sh
app: setup ; @$(BIN)/workbench app $(ARGS)
test: check ; @$(BIN)/python -m pytest -n $(WORKERS)
test-newest: setup ; @PYTHON="$(PYTHON)" sh requirements/test-newest.sh $(ARGS)
demo: setup ; @$(BIN)/workbench demo $(ARGS)
check: setup ; @sh requirements/check.sh
bench: setup ; @$(BIN)/workbench bench $(ARGS)
format: setup ; @$(BIN)/ruff format . && $(BIN)/ruff check --fix .
lock: ; @sh requirements/lock.sh
