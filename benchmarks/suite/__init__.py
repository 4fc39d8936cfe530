"""The benchmarks, one file per group. Each file registers its benchmarks; ``benchmarks.run`` finds the files here."""
