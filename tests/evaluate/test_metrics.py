"""The table of the measures, and what it costs to read it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.encoders import Encoders
from proteus_deploy.evaluate.measure import _COMPUTE, _HOW_TO_GIVE
from proteus_deploy.evaluate.metrics import METRICS, metric

NAMES = (
    "face_sim_arc face_sim_cur face_detection_rate face_fid clip_score clip_score_bgr motion_person "
    "motion_background psnr ssim lpips temporal_consistency"
)


def test_the_names_are_those_that_files_and_budgets_rely_on() -> None:
    assert " ".join(METRICS) == NAMES
    assert all(row.name == name for name, row in METRICS.items())


def test_every_row_can_be_computed_from_what_it_names() -> None:
    assert list(_COMPUTE) == list(METRICS)
    parts = {field.name for field in fields(Encoders)}
    for row in METRICS.values():
        assert row.better in {"higher", "lower", "neither"}
        assert parts.issuperset(row.parts)
        assert set(_HOW_TO_GIVE).issuperset(row.needs)
        assert "\n" not in row.meaning


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert metric("ssim").unit == ""
    with pytest.raises(
        InputError, match=r"no measure 'fvd'; choose from face_sim_arc, .*temporal_consistency"
    ):
        metric("fvd")


def test_the_table_is_read_without_torch() -> None:
    code = (
        "import sys, proteus_deploy.evaluate.metrics, proteus_deploy.evaluate.measure\n"
        "assert not {'torch', 'cv2', 'insightface', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
