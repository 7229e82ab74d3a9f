"""The benchmark suite: `python -m benchmarks`, or `make bench`. docs/performance.md says how it measures."""
