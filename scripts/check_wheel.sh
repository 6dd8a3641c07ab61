#!/bin/sh
# Build the wheel with both native libraries, install it in a new environment without a compiler, and run the CPU tests
# of attention_terms there, from outside the checkout.
#
#   scripts/check_wheel.sh [PYTHON]      PYTHON: that of the environment which builds (default .venv/bin/python)
set -eu
cd "$(dirname "$0")/.."
checkout=$PWD
python=${1:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

pip="-m pip --disable-pip-version-check -q"
ATTBALANCE_CPU=1 ATTBALANCE_CUDA=1 $python $pip wheel . --no-build-isolation --no-deps -w "$work"
wheel=$(echo "$work"/attbalance_ext-*.whl)
$python -m zipfile -l "$wheel" | grep -o 'kernels/lib/libattbalance_cpu.so'
$python -m zipfile -l "$wheel" | grep -o 'kernels/lib/libattbalance_cuda.so'
case $wheel in *-py3-none-linux_*) ;; *) echo "unexpected tag: $wheel"; exit 1 ;; esac

$python -m venv "$work/venv"
mkdir "$work/outside"
cp -r tests pyproject.toml "$work/outside"
cd "$work/outside"
clean() { env -i HOME="$HOME" PATH="$work/venv/bin" "$@"; }
"$work/venv/bin/python" $pip install -c "$checkout/requirements/constraints.txt" torch
"$work/venv/bin/python" $pip install -c "$checkout/requirements/constraints.txt" \
  "$wheel" hypothesis numpy pytest pytest-timeout pytest-xdist scipy
for compiler in c++ g++ nvcc cmake; do
  if clean "$work/venv/bin/python" -c "import shutil, sys; sys.exit(not shutil.which('$compiler'))"; then
    echo "$compiler is in the clean environment"
    exit 1
  fi
done
clean "$work/venv/bin/attbalance" info
# Backend "cuda" and the launches run on the emulated device, which has to be compiled.
clean "$work/venv/bin/python" -m pytest -q -n 2 tests/attention_terms -k 'not cuda' \
  --ignore tests/attention_terms/test_terms_launches.py
