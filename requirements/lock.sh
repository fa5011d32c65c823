#!/bin/sh
# Resolves the locks anew with uv, from the *.in files. torch's CPU build and what must stay out
# (torchvision and torchaudio of another build break transformers beside CPU torch) are overridden.
set -eu
cd "$(dirname "$0")"
uv pip compile cpu.in -o cpu.lock --override cpu.overrides --python-version 3.11 --no-annotate --no-header ${UV_ARGS:-}
uv pip compile dev.in -o dev.lock -c cpu.lock --override cpu.overrides --python-version 3.11 --no-annotate --no-header ${UV_ARGS:-}
uv pip compile cuda.in -o cuda.lock --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header ${UV_ARGS:-}
