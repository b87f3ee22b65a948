#!/usr/bin/env bash
# Runs every tools/benchmark_*.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

shopt -s nullglob
benchmarks=(tools/benchmark_*.py)
if [[ ${#benchmarks[@]} -eq 0 ]]; then
    echo "bench: there is no tools/benchmark_*.py yet: nothing was measured"
    exit 0
fi
for benchmark in "${benchmarks[@]}"; do
    echo "== $benchmark"
    .venv/bin/python "$benchmark"
done
