"""The flag that puts low-rank adapters into a video."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.adapters import AdapterUse

__all__ = ["adapters_of", "add_adapter_argument"]

_FORM = "FILE[:SCALE][@LOW-HIGH]"
_WORDS = re.compile(r"(?P<path>.+?)(?::(?P<scale>[-+0-9.eE]+))?(?:@(?P<low>\d+)-(?P<high>\d+))?")


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --adapter."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar=_FORM,
        help="a person's or a style's LoRA, its strength and the timesteps at which it acts; may be repeated "
        "(docs/adapters.md)",
    )


def adapters_of(texts: Sequence[str]) -> tuple[AdapterUse, ...]:
    """The adapters that --adapter names, read. Raises AdapterError, or InputError for another form."""
    if not texts:
        return ()
    from proteus_deploy.adapters import AdapterUse, TimestepGate, read_adapter

    uses = []
    for text in texts:
        found = _WORDS.fullmatch(text)
        try:
            scale = 1.0 if found is None or found["scale"] is None else float(found["scale"])
        except ValueError:
            found = None
        if found is None:
            raise InputError(f"--adapter is {text!r}; write {_FORM}, as anna.safetensors:0.8@0-250")
        gate = None if found["low"] is None else TimestepGate(int(found["low"]), int(found["high"]))
        uses.append(AdapterUse(read_adapter(found["path"]), scale, gate))
    return tuple(uses)
