"""Servers that do the same job the plain way: what ours are compared with. Each is run as a process of its own."""
