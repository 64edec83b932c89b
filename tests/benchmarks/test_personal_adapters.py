"""The table over people: what an adapter gained, in which share of the distance to drawn clips."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks.machine import is_clean
from proteus_deploy.benchmarks.personal_adapters import summary
from proteus_deploy.benchmarks.personal_table import main


def row(person: int, method: str, arc: float, motion: float, ceiling: float = 0.9) -> dict[str, Any]:
    """Of one person: other measures at 1, a hundred seconds."""
    rest = dict.fromkeys(("face_sim_cur", "clip_score", "clothes_right", "background_right"), 1.0)
    training = {} if method == "frozen" else {"seconds": 100.0}
    measured = {"face_sim_arc": arc, "motion": motion, "ceiling": ceiling}
    return {"person": person, "method": method, "training": training, **rest, **measured}


def test_summary() -> None:
    rows = [row(1, "frozen", 0.5, 2.0), row(1, "rewards", 0.7, 1.8)]
    rows += [row(2, "frozen", 0.7, 4.0), row(2, "rewards", 0.7, 3.9)]
    table = summary(rows)
    assert table["frozen"]["gain"]["mean"] == table["frozen"]["gap_closed"]["mean"] == 0
    found = table["rewards"]
    assert found["gain"]["mean"] == pytest.approx(0.1)
    assert found["gap_closed"]["mean"] == pytest.approx(0.1 / 0.3)
    assert found["motion_kept"]["mean"] == pytest.approx(2.85 / 3.0)
    assert found["prompt_kept"]["mean"] == 1
    assert found["seconds"]["mean"] == 100


def test_the_page_shows_what_was_measured(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = repository / "benchmarks" / "results" / "personal_adapters.json"
    text = (repository / "docs" / "personalize.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- personal_adapters -->\n(.*?)\n<!-- /personal_adapters -->", text, re.DOTALL)
    assert main([str(file)]) == 0
    assert shown == [capsys.readouterr().out.strip()]
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["table"] == summary(document["rows"])
    assert len(document["people"]) == 10
    assert is_clean(document["commit"]), "measure a commit, not a working tree"
