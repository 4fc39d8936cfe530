"""Run by Alembic."""

from migrations.environment import run
from segsvc.postgres import tables

run(tables.catalog)
