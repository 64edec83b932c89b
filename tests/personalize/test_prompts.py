"""Prompt banks: the one that ships, and a user's own."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.personalize.cases import spread
from proteus_deploy.personalize.prompts import GENERAL, PERSON, PromptBank, read_prompts
from proteus_deploy.training.avatars.clothing_and_scene import Scene
from proteus_deploy.training.avatars.motion import MOTIONS, Motion


def test_the_bank_that_ships() -> None:
    templates = read_prompts(GENERAL)
    assert len(templates) >= 50
    bank = PromptBank.of(templates, "a man with a red beard")
    assert not set(bank.training) & set(bank.held_out)
    assert len(bank.training) == 2 * len(bank.held_out) == 36
    assert all(prompt.startswith("a man with a red beard ") for prompt in bank.training)
    assert not any(PERSON in prompt for prompt in bank.held_out)


def test_own_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n\n  {person} eats  \n{person} sleeps\n{person} and {person}\n", encoding="utf-8")
    bank = PromptBank.of(read_prompts(file), "Bo")
    assert bank.training == ("Bo eats", "Bo sleeps")
    assert bank.held_out == ("Bo and Bo",)


def test_the_drawn_prompts_of_the_documentation(repository: Path) -> None:
    """Their sentences are those that the tiny model was trained on."""
    templates = read_prompts(repository / "examples" / "drawn_prompts.txt")
    assert PromptBank.of(templates, "a man").training
    draw = random.Random(0)
    scenes = [Scene.draw(draw) for _ in range(2000)]
    clothes, places = (
        {getattr(one, words)() for one in scenes} for words in ("clothing_words", "place_words")
    )
    movements = {Motion.draw(draw, kind).words("man") for kind in MOTIONS}
    known = {" ".join((PERSON, *parts)) for parts in itertools.product(clothes, movements, places)}
    assert set(templates) <= known


@pytest.mark.parametrize(
    ("templates", "named"),
    [
        (["{person} eats"] * 2, "there are 2 prompts; give at least 3"),
        (["{person} eats"] * 3, "is there twice"),
        (["{person} eats", "{person} sits", "she runs"], "'she runs' has no {person}"),
    ],
)
def test_banks_that_are_none(templates: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        PromptBank.of(templates, "Bo")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read as a list of prompts"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read as a list of prompts"):
        read_prompts(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b"a" * (1 << 21))
    with pytest.raises(InputError, match="1 MiB at most"):
        read_prompts(tmp_path / "large")


def test_videos_are_spread_over_the_prompts() -> None:
    assert spread(["a", "b", "c", "d", "e"], 2, 10) == [("a", 10), ("c", 11)]
    assert spread(["a", "b"], 3, 0) == [("a", 0), ("b", 1), ("a", 2)]
