"""Tables and JSON on standard output."""

from __future__ import annotations

import json

import pytest

from proteus_deploy.cli.output import format_table, print_json, print_table


def test_columns_are_aligned_and_numbers_to_the_right() -> None:
    table = format_table(["stage", "ms", "note"], [["vae_decoder", 12, None], ["denoiser", 1234, "slow"]])
    assert table.splitlines() == [
        "stage          ms  note",
        "-----------  ----  ----",
        "vae_decoder    12",
        "denoiser     1234  slow",
    ]


def test_no_rows() -> None:
    assert format_table(["a", "bc"], []).splitlines() == ["a  bc", "-  --"]


def test_wide_characters_take_two_columns() -> None:
    lines = format_table(["p", "x"], [["日本", "1"], ["ab", "2"]]).splitlines()
    assert lines[2] == "日本  1"
    assert lines[3] == "ab    2"


def test_control_characters_are_shown() -> None:
    assert "\x1b" not in (table := format_table(["name"], [["\x1b[31mred\n"]]))
    assert r"\x1b[31mred\n" in table


def test_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        format_table(["a", "b"], [["x"]])


def test_print_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["a"], [["x"]])
    assert capsys.readouterr().out == "a\n-\nx\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"error": float("nan"), "rows": [(1.5, float("inf"))], "name": "é"})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {"error": None, "rows": [[1.5, None]], "name": "é"}
