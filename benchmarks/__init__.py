"""How fast, how much memory, against whom: what `bench.py` measures, and how."""
