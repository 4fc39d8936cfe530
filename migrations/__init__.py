"""Schema migrations: one Alembic environment for the catalog, one that runs over every shard.

``segsvc migrate`` runs them (``segsvc.postgres.installation.migrate``).
``python -m migrations.new catalog|shard "what changes"`` writes the next one from the difference between
``segsvc.postgres.tables`` and the migrations so far.
"""
