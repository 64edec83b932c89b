"""Characters, kinds of jobs, and which jobs can share a batch."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("kind", sa.Text, nullable=False, server_default="video"))
    op.add_column("jobs", sa.Column("batch_key", sa.Text))
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "characters",
        sa.Column("number", number, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("identity_prompt", sa.Text, nullable=False),
        sa.Column("face_index", sa.Integer),
        sa.Column("photo", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("job_number", number, sa.ForeignKey("jobs.number"), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("characters_order", "characters", ["owner", "number"])


def downgrade() -> None:
    op.drop_table("characters")
    with op.batch_alter_table("jobs") as table:
        table.drop_column("batch_key")
        table.drop_column("kind")
