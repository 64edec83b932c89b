"""The command of a plot: a result file in, a PNG out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.canvas import Canvas

__all__ = ["write_plot"]


def write_plot(
    plot: Callable[[Mapping[str, Any]], Canvas], about: str | None, argv: Sequence[str] | None
) -> int:
    """Draw what `plot` makes of a result file; returns 0. about: a docstring; --help shows its first line."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="TUNE.json")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    document = json.loads(arguments.file.read_text(encoding="utf-8"))
    with atomic_file(arguments.output) as partial:
        partial.write_bytes(plot(document).png())
    return 0
