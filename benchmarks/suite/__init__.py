"""The benchmarks, one file a group. Each file registers its own; ``benchmarks.run`` finds them here."""
