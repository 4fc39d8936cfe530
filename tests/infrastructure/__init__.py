"""Faults of the infrastructure. A package: the installation under test ends with its last test."""
