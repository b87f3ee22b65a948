"""The cases of tools/benchmark_kernels.py: what is computed, by whom, how it is checked, timed and reported."""
