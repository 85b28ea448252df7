"""The competitors of `benchmarks/compare.py`, each run by a small module in an environment of its
own; what they read and write is in `exchange`.
"""
