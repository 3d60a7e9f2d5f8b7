"""How fast, measured against named peers and limits in the same run: `python -m benchmarks [--quick] [row ...]`.

Knows how to time and compare; what is compared stands in `rows/`, the peers' own code in `peers/`. docs/performance.md
says what every row means.
"""
