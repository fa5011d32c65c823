PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup app test test-newest demo check bench format lock

setup: ; @PYTHON="$(PYTHON)" sh requirements/setup.sh
app: setup ; @$(BIN)/workbench app $(ARGS)
test: check ; @$(BIN)/python -m pytest
test-newest: setup ; @PYTHON="$(PYTHON)" sh requirements/test-newest.sh $(ARGS)
demo: setup ; @$(BIN)/workbench demo $(ARGS)
check: setup ; @sh requirements/check.sh
bench: setup ; @$(BIN)/workbench bench $(ARGS)
format: setup ; @$(BIN)/ruff format . && $(BIN)/ruff check --fix .
lock: ; @sh requirements/lock.sh
