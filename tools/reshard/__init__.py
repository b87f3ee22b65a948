"""What tools/benchmark_reshard.py runs: plans of published size without devices, and small updates on this machine."""
