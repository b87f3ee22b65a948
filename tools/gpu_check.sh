#!/usr/bin/env bash
# Builds for CUDA, runs the tests marked gpu, benchmarks the kernels where there is a benchmark for them, and training.
# What was printed is kept as benchmarks/results/gpu_check_<GPU>_<date>.txt, training's table as training_<GPU>_<date>.md.
# Exit code 2: no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON_VENV=.venv/bin/python

if ! gpu=$("$PYTHON_VENV" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
print(torch.cuda.get_device_name().replace(" ", "_"))'); then
    echo "gpu-check: no usable GPU: nothing was checked." >&2
    echo "gpu-check: if this machine has a GPU, 'GSPO_CUDA=1 make setup' replaces a CPU build of torch." >&2
    exit 2
fi

check() {
    echo "gpu-check: $gpu, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    shopt -s nullglob
    local kernels=(csrc/cuda/*.cu) tests=(tests/gpu/test_*.py)
    if [[ ${#kernels[@]} -gt 0 ]]; then
        GSPO_CUDA=1 "$PYTHON_VENV" -m pip install --disable-pip-version-check --no-deps -e . || return
    else
        echo "gpu-check: csrc/cuda has no kernels: nothing to build"
    fi
    if [[ ${#tests[@]} -eq 0 ]]; then
        echo "gpu-check: tests/gpu has no tests yet"
        return 1
    fi
    OMP_NUM_THREADS=1 "$PYTHON_VENV" -m pytest tests/gpu -m gpu || return
    if [[ -f tools/benchmark_kernels.py ]]; then "$PYTHON_VENV" tools/benchmark_kernels.py || return; fi
    "$PYTHON_VENV" tools/benchmark_training.py --variants none,selective,moe,full,none+offload \
        --output "benchmarks/results/training_$suffix.md" || return
}

mkdir -p benchmarks/results
suffix=${gpu}_$(date -u +%F)
result=benchmarks/results/gpu_check_$suffix.txt
status=0
check 2>&1 | tee "$result" || status=${PIPESTATUS[0]}
echo "gpu-check: $([[ $status -eq 0 ]] && echo passed || echo "FAILED with exit code $status"); written to $result"
exit "$status"
