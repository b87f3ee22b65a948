"""The two sides of tools/benchmark_end_to_end.py, what they say to each other, and the report."""
