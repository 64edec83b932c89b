"""`proteus-deploy calibrate`: the statistics on disk, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proteus_deploy.cli.main import main
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.tiny.trained import MODEL


def test_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "statistics"
    words = ["calibrate", "--people", "1", "--num-inference-steps", "2", "--output-dir", str(folder)]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = ActivationStatistics.load(folder)
    assert document["hash"] == found.hash
    assert set(document["layers"]) == set(found.layers)
    assert {name.partition("/")[0] for name in found.layers} == {"denoiser", "text_encoder", "image_tower"}
    # Once more: the result is there, and the table shows it.
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split()[:3] == ["input", "largest", "99.9"]
    assert "case person" not in captured.err
    assert main([*words, "--timestep-groups", "2"]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(MODEL)], "needs --cases: only the model that ships brings its own"),
        (["--people", "0"], "--people is 0; choose 1 to 30"),
        (["--timestep-groups", "0"], "choose 1 to 1000"),
        ([str(MODEL), "--cases", "nowhere.json"], "nowhere.json"),
        (["nowhere", "--cases", "nowhere.json"], "nowhere is not a folder"),
    ],
)
def test_wrong_flags(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *words, "--output-dir", str(tmp_path / "statistics")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "statistics").exists()
