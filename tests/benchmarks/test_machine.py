"""What result files say of the code they were made with, and what may be kept from one run to the next."""

from __future__ import annotations

import subprocess
from pathlib import Path

from proteus_deploy.benchmarks.machine import describe_code, describe_commit


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_code_is_known_by_its_commit_only_while_nothing_is_changed(tmp_path: Path) -> None:
    outside = describe_code(tmp_path)
    assert describe_commit(tmp_path) == "unknown"
    assert outside.startswith("unknown-")
    assert outside != describe_code(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    assert describe_code(tmp_path) == describe_code(tmp_path) == describe_commit(tmp_path)
    (tmp_path / "new").write_text("x")
    assert describe_commit(tmp_path).endswith("-dirty")
    changed = describe_code(tmp_path)
    assert changed.startswith(describe_commit(tmp_path) + "-")
    assert changed != describe_code(tmp_path)
