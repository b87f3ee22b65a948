#!/usr/bin/env bash
# Builds for CUDA, runs the tests marked gpu, the kernels' once more under compute-sanitizer where there is one, and
# benchmarks the kernels and training. What was printed is kept as benchmarks/results/gpu_check_<GPU>_<date>.txt, the
# benchmarks' tables as kernels_<GPU>_<date>.md and training_<GPU>_<date>.md.
#
#   tools/gpu_check.sh [PART…]    parts: tests sanitizer kernels training; default: all. What is printed names them.
#
# Exit code 2: no GPU, or an unknown part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON_VENV=.venv/bin/python
PARTS=(tests sanitizer kernels training)

[[ $# -eq 0 ]] || PARTS=("$@")
for part in "${PARTS[@]}"; do
    case $part in
        tests | sanitizer | kernels | training) ;;
        *)
            echo "gpu-check: '$part' is no part; use tests, sanitizer, kernels or training" >&2
            exit 2
            ;;
    esac
done

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
    local part
    echo "gpu-check: $gpu, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), ${PARTS[*]}"
    GSPO_CUDA=1 "$PYTHON_VENV" setup.py build_ext --inplace || return
    for part in "${PARTS[@]}"; do "run_$part" || return; done
}

run_tests() { OMP_NUM_THREADS=1 "$PYTHON_VENV" -m pytest tests/gpu -m gpu; }

run_kernels() { "$PYTHON_VENV" tools/benchmark_kernels.py --device cuda --output "benchmarks/results/kernels_$suffix"; }

run_training() {
    "$PYTHON_VENV" tools/benchmark_training.py --variants none,selective,moe,full,none+offload \
        --output "benchmarks/results/training_$suffix.md"
}

run_sanitizer() {  # every tensor in an allocation of its own, so that an access beyond its end is seen; without what takes long
    local tool slow="not two_to_the_31 and not never_hold and not graph and not stream and not grid_once and not float32_errors"
    if ! command -v compute-sanitizer >/dev/null; then
        echo "gpu-check: no compute-sanitizer: memory accesses and races were not checked"
        return
    fi
    for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON_VENV" -m pytest tests/gpu/test_kernels.py -m gpu -k "$slow" --timeout 1200 || return
    done
}

mkdir -p benchmarks/results
suffix=${gpu}_$(date -u +%F)
result=benchmarks/results/gpu_check_$suffix.txt
status=0
check 2>&1 | tee "$result" || status=${PIPESTATUS[0]}
echo "gpu-check: $([[ $status -eq 0 ]] && echo passed || echo "FAILED with exit code $status"); written to $result"
exit "$status"
