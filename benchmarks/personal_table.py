"""The table of docs/personalize.md, from the file that `personal_adapters` writes.

python -m proteus_deploy.benchmarks.personal_table benchmarks/results/personal_adapters.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_deploy.errors import InputError
from proteus_deploy.weights import read_json

__all__ = ["main", "personal_table"]

_HEADER = (
    "| trained by | FaceSim | gain, 95% interval | of the distance to drawn clips | motion kept | "
    "CLIPScore kept | clothes, background right | seconds |"
)


def personal_table(document: Mapping[str, Any]) -> str:
    """Markdown: a line for each method, and below them what they were measured with."""
    lines = [_HEADER, "|---" * _HEADER.count(" |") + "|"]
    for name, found in document["table"].items():
        means = {key: value["mean"] for key, value in found.items()}
        gain = found["gain"]
        own = name == "frozen"
        cells = [
            "nothing: the frozen model" if own else name,
            f"{means['face_sim_arc']:.3f}",
            "" if own else f"{gain['mean']:+.3f}, {gain['ci_low']:+.3f} to {gain['ci_high']:+.3f}",
            "" if own else f"{means['gap_closed']:.0%}",
            "" if own else f"{means['motion_kept']:.3f}",
            "" if own else f"{means['prompt_kept']:.3f}",
            f"{means['clothes_right']:.0%}, {means['background_right']:.0%}",
            "" if own else f"{means['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(document)])


def _conditions(document: Mapping[str, Any]) -> str:
    machine, settings, versions = document["machine"], document["settings"], document["versions"]
    videos = sum(len(row["videos"]["motion"]) for row in document["rows"] if row["method"] == "frozen")
    drawn = document["table"]["frozen"]["ceiling"]["mean"]
    people = len(document["people"])
    rank, rate, steps = (settings[name] for name in ("rank", "learning_rate", "steps"))
    training = f"Rank {rank}, learning rate {rate}, {steps} steps at most"
    return (
        f"{people} people whom no network saw, one photo each, {videos} videos for each line; "
        f"drawn clips: {drawn:.3f}. {training}, float32; {machine['cpu']}, two people side by side, a core "
        f"each; torch {versions['torch']}; commit {document['commit'][:12]}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a result file."""
    parser = argparse.ArgumentParser(prog="personal_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    print(personal_table(read_json(given.file, error=InputError)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
