"""Benchmarks of the whole and of its parts, each beside an honest reference on the same servers: ``make bench``."""
