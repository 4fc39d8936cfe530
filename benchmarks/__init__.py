"""Benchmarks of the service and of its parts, each beside an honest reference on the same servers: ``make bench``."""
