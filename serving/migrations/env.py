"""Run by Alembic: migrates over the connection that database.py hands in."""

from __future__ import annotations

from alembic import context

from proteus_deploy.serving.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
# The connection's owner has begun a transaction and commits it: tables and version change together.
context.run_migrations()
