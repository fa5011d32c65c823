#!/bin/sh
# Format, lint, types, import rules.
set -eu
cd "$(dirname "$0")/.."
.venv/bin/ruff format --check --quiet . || { echo "Not formatted; run 'make format'." >&2; exit 1; }
.venv/bin/ruff check --quiet .
.venv/bin/lint-imports --no-logo 2>/dev/null || .venv/bin/lint-imports
.venv/bin/pyright --pythonpath .venv/bin/python
