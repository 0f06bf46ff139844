#!/usr/bin/env bash
# Tests and benchmarks of the ops on a GPU. Needs this repository and a machine with torch (CUDA),
# pytest, pytest-benchmark, cmake, ninja, pybind11 and, for the searches, a CUDA toolkit at CUDA_HOME
# (without one they run on their references, and the record says so).
#   bench/gpu.sh [folder for the results, default bench/results]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-bench/results}
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'
"$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" -m pytest -q -m gpu tests/ops
"$python" -m pytest -q bench/bench_*.py --record
mkdir -p "$out"
latest=$(ls -t bench/results/*.json | head -n 1)
[ "$out" = bench/results ] || cp "$latest" "$out/"
"$python" -m bench.plot "$latest"
