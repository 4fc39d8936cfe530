"""All tests. A package, so that fixtures of a folder below can end with the last test of the folder."""
