"""Who calls: credentials (tokens, JWTs, names in certificates) and the files that say whom to believe."""
