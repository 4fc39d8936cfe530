"""The service as its users see it. A package: its stack ends with its last test."""
