#!/bin/sh
# The tests of training with the newest transformers 5, in an environment of their own: everything
# but transformers, and what it asks for in other versions, comes from .venv.
set -eu
cd "$(dirname "$0")/.."
folder=.venv-newest
[ -x "$folder/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$folder"
site="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/shared.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
  'transformers>=5.17,<6' 2>"$folder/pip.log" || { grep -v '^WARNING' "$folder/pip.log" >&2; exit 3; }
"$folder/bin/python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
PYTHONPATH="$PWD:$PWD/kernels" exec "$folder/bin/python" -m pytest tests/train "$@"
