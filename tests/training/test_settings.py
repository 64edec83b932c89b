"""The recipe: rates, shares, and documents that don't fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.encoding import PrepareSettings
from proteus_deploy.training.data.folder import VideoOptions
from proteus_deploy.training.settings import TrainSettings, read_settings


def test_rates() -> None:
    settings = TrainSettings(steps=12, warmup=4, learning_rate=0.8)
    rates = [settings.rate(step) for step in range(13)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[8] == pytest.approx(0.4)  # half of the cosine
    assert rates[12] == 0
    assert TrainSettings(steps=12, warmup=0, schedule="constant").rate(11) == 3e-6
    assert TrainSettings(steps=2, warmup=0).rate(0) == 3e-6
    assert TrainSettings(steps=2, warmup=9, learning_rate=9.0).rate(1) == 2.0


def test_shares() -> None:
    assert TrainSettings(batch_size=8, micro_batch=0).share(2) == (4, 4)
    assert TrainSettings(batch_size=8, micro_batch=2).share(2) == (4, 2)
    with pytest.raises(InputError, match="batch_size 8 can't be shared by 3 processes; choose a multiple"):
        TrainSettings(batch_size=8).share(3)
    with pytest.raises(InputError, match="micro_batch 3 doesn't divide the 4 clips that each of 2 processes"):
        TrainSettings(batch_size=8, micro_batch=3).share(2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; choose at least 1"),
        ({"micro_batch": -1}, "micro_batch is -1; choose 0 or more"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; choose a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"clip_norm": 0.0}, r"clip_norm is 0\.0; choose a number above 0"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1; choose a number of at least 0"),
        ({"text_dropout": 1.5}, r"text_dropout is 1\.5; choose a share, from 0 to 1"),
        ({"ema": 1.0}, r"ema is 1\.0; choose 0 \(no averaging\) or more, below 1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\); choose two numbers"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainSettings(**values)


def test_reading() -> None:
    """Whole numbers serve as numbers, lists as pairs; what isn't named stays."""
    document = {"learning_rate": 1, "betas": [0, 0.5], "aml": False, "mask": "face", "steps": 3}
    settings = read_settings(document, TrainSettings(seed=7), "file")
    assert (settings.learning_rate, settings.betas, settings.aml) == (1.0, (0.0, 0.5), False)
    assert (settings.mask, settings.steps, settings.seed) == ("face", 3, 7)
    assert read_settings({"fps": 8, "num_frames": 9}, VideoOptions(), "file").fps == 8.0
    assert str(read_settings({"raft_weights": "a/b"}, PrepareSettings(), "file").raft_weights) == "a/b"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"stepz": 3}, "run.toml: 'stepz' is no setting; known are aml, .*warmup"),
        ({"steps": 3.5}, r"run.toml: steps is 3\.5; expected a whole number"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"learning_rate": "3e-6"}, "learning_rate is '3e-6'; expected a number"),
        ({"aml": 1}, "aml is 1; expected true or false"),
        ({"betas": [0.9]}, r"betas is \[0\.9\]; expected two numbers"),
        ({"schedule": "linear"}, "schedule is 'linear'; choose cosine or constant"),
        ([("steps", 3)], r"run.toml is \[\('steps', 3\)\]; expected a table of settings"),
    ],
)
def test_documents_that_do_not_fit(document: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_settings(document, TrainSettings(), "run.toml")


def test_a_run_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    from proteus_deploy.training.run import read_run_file

    file = tmp_path / "run.toml"
    file.write_bytes(b"\xae\x00[train]")
    with pytest.raises(InputError, match=r"run\.toml can't be read as TOML"):
        read_run_file(file)
