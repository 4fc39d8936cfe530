"""The contract of the front. A package: the front under test ends with its last test."""
