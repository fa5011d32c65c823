#!/bin/sh
# Makes .venv, once for each lock. An interrupted set-up is finished by the next; a finished one
# costs nothing.
set -eu
cd "$(dirname "$0")/.."
if [ -e /proc/driver/nvidia/version ]; then flavour=cuda; else flavour=cpu; fi
lock="requirements/$flavour.lock"
stamp=".venv/.installed-$(cat "$lock" requirements/dev.lock pyproject.toml requirements/setup.sh | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0

if ! command -v "${PYTHON:-python3.11}" >/dev/null; then
  echo "Python 3.11 is needed; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 3
fi
echo "Setting up .venv ($flavour); this takes some minutes, once."
"${PYTHON:-python3.11}" -m venv .venv
# pip says for each package which of its sources does not have it; only errors are worth a line.
# pip compiles one file after another; below it is done on all cores.
quiet="--quiet --disable-pip-version-check --no-deps --no-compile"
pip() { .venv/bin/python -m pip "$@" 2>.venv/pip.log || { grep -v '^WARNING' .venv/pip.log >&2; return 1; }; }
if [ "$flavour" = cpu ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  torch="$(grep '^torch==' "$lock")"
  if ! pip install $quiet "$torch" 2>/dev/null; then
    echo "Looking for $torch on PyTorch's own index."
    pip install $quiet uv
    .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu --no-deps "$torch" || {
      echo "No source has $torch. Name PyTorch's CPU index, which its 'Get started' page shows:" >&2
      echo "    make setup PIP_EXTRA_INDEX_URL=<address of the index>" >&2; exit 3; }
  fi
fi
pip install $quiet -r "$lock" -r requirements/dev.lock || {
  echo "The packages could not be installed; check the network or pip's settings, and run make again." >&2; exit 3; }
pip install $quiet --no-build-isolation --editable .
# Without it every process compiles what it imports. A few files are templates, and no Python.
.venv/bin/python -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' .venv/lib || true
touch "$stamp"
echo "Ready."
