"""segsvc: which segments is this user in? Answered at every login, correct under faults."""

__version__ = "0.2.0"
