"""Simulated prompt augmentation: one person in many scenes, doing and wearing many things.

A bank is a text file, one prompt a line, with `{person}` where the description of the person goes; blank
lines and lines that begin with # are left out. `general.txt` ships with the package. Every third prompt is
held out: it is measured with and never trained on, as the paper keeps its prompts for training and test
apart (PersonalVideo, arXiv 2411.17048).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proteus_deploy.errors import InputError

__all__ = ["GENERAL", "PERSON", "PromptBank", "read_prompts"]

PERSON = "{person}"
GENERAL = Path(__file__).with_name("general.txt")
_HELD_OUT = 3  # one in so many
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class PromptBank:
    """Prompts with the person in them."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(cls, templates: Sequence[str], person: str) -> PromptBank:
        """Raises InputError for fewer than three prompts, doubles, or one without `{person}`."""
        if len(templates) < _HELD_OUT:
            raise InputError(
                f"there are {len(templates)} prompts; give at least {_HELD_OUT}, since one in {_HELD_OUT} is "
                "held out"
            )
        if len(set(templates)) != len(templates):
            double = next(one for one in templates if templates.count(one) > 1)
            raise InputError(f"the prompt {double!r} is there twice; it could be trained on and held out")
        for template in templates:
            if PERSON not in template:
                raise InputError(f"the prompt {template!r} has no {PERSON}, where the person's look goes")
        filled = [template.replace(PERSON, person) for template in templates]
        return cls(
            tuple(one for place, one in enumerate(filled) if place % _HELD_OUT != _HELD_OUT - 1),
            tuple(filled[_HELD_OUT - 1 :: _HELD_OUT]),
        )


def read_prompts(file: Path) -> tuple[str, ...]:
    """The templates of a bank's file. Raises InputError where it can't be read."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InputError(f"{file} has {file.stat().st_size} bytes; a list of prompts has 1 MiB at most")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read as a list of prompts ({error}); one prompt a line") from error
    return tuple(stripped for line in lines if (stripped := line.strip()) and not stripped.startswith("#"))
