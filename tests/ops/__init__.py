"""Tests of the operations. A package, as benchmarks/ops.py would otherwise have its name."""
