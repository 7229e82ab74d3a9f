"""The benchmark suite: `python -m benchmarks`, or `make bench`. docs/performance.md describes the method."""
