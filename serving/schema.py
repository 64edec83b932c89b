"""The tables, as SQLAlchemy sees them; `migrations/` makes them."""

from __future__ import annotations

import sqlalchemy as sa

__all__ = ["adapters", "characters", "inputs", "jobs", "metadata", "queue_clock"]

metadata = sa.MetaData()

# SQLite counts up by itself only in a column that is declared INTEGER.
_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", _Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    # "video", or "character": a registered photo that is to be encoded.
    sa.Column("kind", sa.Text, nullable=False, default="video"),
    # Jobs of one key can share a batch; none where a job has to be alone.
    sa.Column("batch_key", sa.Text),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("request_hash", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("cost", sa.Double, nullable=False),
    # Place in the fair order: the smallest goes first.
    sa.Column("turn", sa.Double, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("crashes", sa.Integer, nullable=False, default=0),
    sa.Column("worker", sa.Text),
    sa.Column("lease_until", sa.Double),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("deleted", sa.Boolean, nullable=False, default=False),
    sa.Column("deadline_at", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("progress", sa.JSON),
    sa.Column("last_failure", sa.Text),
    sa.Column("failure_code", sa.Text),
    sa.Column("failure_message", sa.Text),
    sa.Column("result_name", sa.Text),
    sa.Column("result_bytes", sa.BigInteger),
    sa.Column("result_sha256", sa.Text),
    sa.Column("result_facts", sa.JSON),
    sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
    sa.Index("jobs_order", "state", "turn", "number"),
    # Numbers are never given twice: they are the cursor of lists.
    sqlite_autoincrement=True,
)

# What a job needs besides its JSON; gone as soon as the job is finished, for it is a photo of a person.
inputs = sa.Table(
    "inputs",
    metadata,
    sa.Column("job_number", _Number, sa.ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True),
    sa.Column("photo", sa.LargeBinary, nullable=False),
)

# People whose photo was registered once. Whether it could be encoded is in the job's row, which stays
# as long.
characters = sa.Table(
    "characters",
    metadata,
    sa.Column("number", _Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("identity_prompt", sa.Text, nullable=False),
    sa.Column("face_index", sa.Integer),
    sa.Column("photo", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("job_number", _Number, sa.ForeignKey("jobs.number"), nullable=False),
    sa.Index("characters_order", "owner", "number"),
    sqlite_autoincrement=True,
)

# Low-rank adapters that were uploaded once; `data` is the safetensors file.
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("number", _Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("gate_low", sa.Integer, nullable=False),
    sa.Column("gate_high", sa.Integer, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Index("adapters_order", "owner", "number"),
    sqlite_autoincrement=True,
)

# One row: how far the fair order has come.
queue_clock = sa.Table(
    "queue_clock",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("turn", sa.Double, nullable=False),
)
