"""Servers that do the same job in the plain way, as references for ours. Each one runs as a process of its own."""
