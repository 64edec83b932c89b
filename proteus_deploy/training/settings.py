"""How a transformer is trained: every number that the result depends on, in one frozen record."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from proteus_deploy.errors import InputError

__all__ = ["AttentionForm", "TrainSettings", "check_values", "read_settings"]

RateSchedule = Literal["cosine", "constant"]
AttentionForm = Literal["fused", "plain"]
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class TrainSettings:
    """The recipe. Defaults are the published ones for the 5B model, where something was published.

    Data and time
        steps: optimiser steps. batch_size: clips in a step, over all processes. micro_batch: clips that one
        process takes at once; 0 is its whole share. Smaller ones change memory, not the result.

    What is trained
        trainable: "identity" is MIF, TAII and identity attention on a frozen backbone, "all" everything.
        fusion_text, time_aware: without one, MIF doesn't read the identity prompt, or TAII isn't told the
        time.

    Optimiser
        optimiser: "adamw" as published, or "muon" for the matrices inside blocks (see optimisers.py).
        The rate rises over `warmup` steps and then falls along a cosine to 0, or stays ("constant").
        ema: share of the averaged weights that a step keeps; checkpoints hold the averaged weights. 0: none.
        attention: "fused", or "plain" for few tokens on a CPU (see attention.py).

    Objective
        image_dropout: share of clips whose condition image is dropped. text_dropout: share of clips whose
        prompt becomes the empty one, which is what makes guidance work; the published recipe has none.
        mask: where a masked step looks; mask_probability: share of masked steps, 0 for none. aml: whether
        the loss is weighted with motion; aml_lambda and aml_normalise as in aml.aml_weights.
    """

    steps: int = 8000
    batch_size: int = 16
    micro_batch: int = 0
    trainable: Literal["identity", "all"] = "all"
    fusion_text: bool = True
    time_aware: bool = True
    optimiser: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-6
    schedule: RateSchedule = "cosine"
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    ema: float = 0.999
    mixed_precision: Literal["no", "bf16"] = "bf16"
    gradient_checkpointing: bool = True
    attention: AttentionForm = "fused"
    image_dropout: float = 0.05
    text_dropout: float = 0.0
    mask: Literal["head", "face"] = "head"
    mask_probability: float = 0.5
    aml: bool = True
    aml_lambda: float = 1.0
    aml_normalise: bool = False
    loss_form: Literal["v", "x0"] = "v"
    seed: int = 42

    def __post_init__(self) -> None:
        check_values(self, "at least 1", lambda value: value >= 1, "steps", "batch_size")
        check_values(self, "0 or more", lambda value: value >= 0, "micro_batch", "warmup")
        check_values(
            self,
            "a number above 0",
            lambda value: 0 < value < math.inf,
            "learning_rate",
            "epsilon",
            "clip_norm",
        )
        check_values(
            self, "a number of at least 0", lambda value: 0 <= value < math.inf, "weight_decay", "aml_lambda"
        )
        check_values(
            self,
            "a share, from 0 to 1",
            lambda value: 0 <= value <= 1,
            "image_dropout",
            "text_dropout",
            "mask_probability",
        )
        check_values(self, "0 (no averaging) or more, below 1", lambda value: 0 <= value < 1, "ema")
        check_values(
            self, "two numbers from 0 to below 1", lambda pair: all(0 <= one < 1 for one in pair), "betas"
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def share(self, processes: int) -> tuple[int, int]:
        """(clips of one process in a step, clips it takes at once); InputError where they don't divide."""
        if self.batch_size % processes:
            raise InputError(
                f"batch_size {self.batch_size} can't be shared by {processes} processes; choose a multiple"
            )
        share = self.batch_size // processes
        micro = self.micro_batch or share
        if share % micro:
            raise InputError(
                f"micro_batch {micro} doesn't divide the {share} clips that each of {processes} processes "
                "takes; choose a divisor"
            )
        return share, micro


def check_values(record: Any, expected: str, fits: Callable[[Any], bool], *names: str) -> None:
    """Raises InputError for the first of these fields that doesn't fit, saying what is expected."""
    for name in names:
        if not fits(getattr(record, name)):
            raise InputError(f"{name} is {getattr(record, name)}; choose {expected}")


def read_settings(document: Mapping[str, Any], base: _Record, source: str) -> _Record:
    """The settings record `base`, a dataclass, with the values of a parsed document in it.

    source: what the document is, for messages. Raises InputError naming a key that the record doesn't have,
    or a value of another type; the record's own rules are checked too.
    """
    if not isinstance(document, Mapping):
        raise InputError(f"{source} is {document!r}; expected a table of settings")
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in document.items():
        if key not in hints:
            raise InputError(f"{source}: {key!r} is no setting; known are {', '.join(sorted(hints))}")
        changes[key] = _typed(key, value, hints[key], source)
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _typed(key: str, value: Any, hint: Any, source: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # "X | None": None is what a document leaves out
        (hint,) = (part for part in parts if part is not type(None))
        return None if value is None else _typed(key, value, hint, source)
    if origin is Literal:
        if value not in parts:
            raise InputError(f"{source}: {key} is {value!r}; choose {' or '.join(map(str, parts))}")
        return value
    if origin is tuple:
        if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))):
            raise InputError(f"{source}: {key} is {value!r}; expected two numbers")
        return tuple(float(part) for part in value)
    if hint is float and _is_number(value):
        return float(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if type(value) is not hint:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise InputError(f"{source}: {key} is {value!r}; expected {expected.get(hint, 'a path')}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
