"""Jobs, their photos, and the clock of the fair order."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "jobs",
        sa.Column("number", number, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("request_hash", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("cost", sa.Double, nullable=False),
        sa.Column("turn", sa.Double, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("lease_until", sa.Double),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
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
        sqlite_autoincrement=True,
    )
    op.create_index("jobs_order", "jobs", ["state", "turn", "number"])
    op.create_table(
        "inputs",
        sa.Column("job_number", number, sa.ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True),
        sa.Column("photo", sa.LargeBinary, nullable=False),
    )
    clock = op.create_table(
        "queue_clock",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("turn", sa.Double, nullable=False),
    )
    op.bulk_insert(clock, [{"id": 1, "turn": 0.0}])


def downgrade() -> None:
    op.drop_table("inputs")
    op.drop_table("queue_clock")
    op.drop_table("jobs")
