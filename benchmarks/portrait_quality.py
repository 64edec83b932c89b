"""What portraits of the tiny model show with each cache policy and budget; and what ADSA's parts do.

    python -m proteus_deploy.benchmarks.portrait_quality --work DIR --json FILE [--ablations] [--validation]
        [--temperature T]

Every cell draws the same captions with the same seeds: photos of the held-out people, several each (of other
people with --validation, for choosing settings). Beside the means stand differences from the dense portraits
of the same wishes, so that what the captions are like falls out.

    identity   share of the written looks (kind, age, hair, hat, glasses, beard) that a judge sees
    scene      the same of clothes and place
    text       CLIP score of picture and caption
    distance   Frechet distance of features to those of drawn photos
    agreement  share of tokens that are the dense ones: drawn freely, and after the dense tokens ("forced")
    psnr       between the pictures

Tokens of each cell are kept in --work, so an interrupted run goes on. The judge is trained there at first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from proteus_deploy._files import atomic_file, check_writable, write_json
from proteus_deploy.benchmarks.machine import (
    describe_code,
    describe_commit,
    describe_machine,
    describe_versions,
)
from proteus_deploy.benchmarks.portrait_measures import (
    Measures,
    Wish,
    differences,
    distance_interval,
    psnr,
    summarise,
)
from proteus_deploy.evaluate.statistics import estimate
from proteus_deploy.portrait.decoding import Decoding
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.portrait.plan import DENSE, CacheSettings
from proteus_deploy.portrait.sampling import draw_token, guide
from proteus_deploy.tiny.trained import PORTRAIT
from proteus_deploy.training.avatars import HELD_OUT_SEEDS
from proteus_deploy.training.tiny_portrait.attribute_judge import train_judge
from proteus_deploy.training.tiny_portrait.drawn_photos import draw_photos

__all__ = ["main"]

_VALIDATION = tuple(range(60_000, 60_200))  # neither held out nor trained on
_LARGE, _BUDGETS = 0.75, (0.5, 0.35, 0.25)
_POLICIES = ("adsa", "sink-window", "random", "uniform", "attention")
_JUDGE_PHOTOS = 24_000
_FORCED = 60  # wishes of the forced agreement
_BATCH = 60


@dataclass(frozen=True)
class Cell:
    """A row of the table."""

    name: str
    cache: CacheSettings


def cells(own: CacheSettings, *, ablations: bool) -> list[Cell]:
    """Dense first, then what the model's own settings become with another policy and budget.

    Ablations change one part of ADSA at a time, at a budget where it matters.
    """
    if not ablations:
        pairs = [("adsa", _LARGE), *((policy, budget) for budget in _BUDGETS for policy in _POLICIES)]
        rows = [
            Cell(f"{policy} {budget:.0%}", replace(own, policy=policy, budget=budget))
            for policy, budget in pairs
        ]
        return [Cell("dense", DENSE), *rows]
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "no prefix beside the caption": {"prefix": 0},
        "prefix of 10%": {"prefix": 26},
        "window of 1": {"window": 1},
        "window of half a row": {"window": 9},
        "window of two rows and one": {"window": 33},
        "no selection: sink and window": {"policy": "sink-window"},
        "the sum of all that was seen": {"redundancy": "seen"},
        "each head by itself": {"scope": "head"},
        "a choice at every step": {"cadence": 1},
        "a choice every 16 steps": {"cadence": 16},
    }
    settings = [
        Cell(name, replace(own, **{"policy": "adsa", "budget": 0.35, **change}))
        for name, change in changes.items()
    ]
    return [Cell("dense", DENSE), *settings]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, measure, write the result file."""
    parser = argparse.ArgumentParser(prog="portrait_quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--portrait", type=Path, default=PORTRAIT)
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--validation", action="store_true", help="people for choosing settings")
    parser.add_argument("--photos", type=int, default=8, help="captions of each person")
    parser.add_argument("--seeds", type=int, default=2, help="portraits of each caption")
    parser.add_argument("--cell", action="append", help="these rows only, by name")
    parser.add_argument("--temperature", type=float, help="by default the model's own")
    given = parser.parse_args(arguments)
    check_writable(given.json)
    painter = TorchPainter.open(given.portrait)
    if given.temperature is not None:
        painter.sampling = replace(painter.sampling, temperature=given.temperature)
    people = _VALIDATION if given.validation else HELD_OUT_SEEDS
    wishes = [
        Wish(person, photo, 1000 * seed + number)
        for number, (person, photo) in enumerate((one, k) for one in people for k in range(given.photos))
        for seed in range(given.seeds)
    ]
    photos, _ = draw_photos(given.work / "photos", _JUDGE_PHOTOS)
    measures = Measures(train_judge(given.work / "judge", photos))
    chosen = cells(painter.cache, ablations=given.ablations)
    if given.cell:
        chosen = [one for one in chosen if one.name in given.cell or one.name == "dense"]
    rows: list[dict[str, Any]] = []
    dense: Mapping[str, Any] | None = None
    for cell in chosen:
        found = _measure(painter, cell, wishes, measures, given.work)
        dense = found if dense is None else dense
        rows.append(_row(cell, found, dense, wishes, measures, painter))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    document = {
        "what": "portraits of the tiny model with each cache policy, the same captions and seeds",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {
            "people": [int(person) for person in people],
            "captions_of_each": given.photos,
            "portraits_of_each": given.seeds,
            "sampling": asdict(painter.sampling),
            "weights": painter.checkpoint.hash,
        },
        "drawn_photos": _drawn(wishes, measures),
        "rows": rows,
    }
    write_json(given.json, document)
    return 0


def _measure(
    painter: TorchPainter, cell: Cell, wishes: Sequence[Wish], measures: Measures, work: Path
) -> dict[str, Any]:
    tokens = _tokens(painter, cell, wishes, work)
    pictures = np.stack(painter.pictures(tokens))
    return {"tokens": tokens, "pictures": pictures, **measures.of(pictures, wishes)}


def _tokens(painter: TorchPainter, cell: Cell, wishes: Sequence[Wish], work: Path) -> Tensor:
    """Of all wishes, from the file of an earlier run of the same code where there is one."""
    facts = [
        describe_code(Path(__file__).resolve().parents[1]),
        asdict(cell.cache),
        asdict(painter.sampling),
        [asdict(wish) for wish in wishes],
        painter.checkpoint.hash,
    ]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    file = work / "tokens" / f"{name}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        found = []
        for start in range(0, len(wishes), _BATCH):
            some = wishes[start : start + _BATCH]
            found.append(
                painter.draw_tokens(
                    [wish.caption for wish in some], cache=cell.cache, seeds=[wish.seed for wish in some]
                )
            )
            print(f"{cell.name}: {start + len(some)} of {len(wishes)}", file=sys.stderr, flush=True)
        with atomic_file(file) as new, new.open("wb") as stream:
            np.save(stream, torch.cat(found).numpy().astype(np.int16))
    return torch.from_numpy(np.load(file)).long()


def _row(
    cell: Cell,
    found: Mapping[str, Any],
    dense: Mapping[str, Any],
    wishes: Sequence[Wish],
    measures: Measures,
    painter: TorchPainter,
) -> dict[str, Any]:
    people = [str(wish.person) for wish in wishes]
    config = painter.gpt.config
    plan = cell.cache.plan(config.cls_token_num, config.block_size, config.grid_size)
    row: dict[str, Any] = {
        "name": cell.name,
        "cache": asdict(cell.cache),
        "share_of_dense_slots": plan.slots / config.length,
        **summarise(found, wishes),
        "distance": distance_interval(
            measures, found["features"], None if found is dense else dense["features"], wishes
        ),
    }
    if found is not dense:
        same = (found["tokens"] == dense["tokens"]).double().mean(dim=1)
        row["minus_dense"] = differences(found, dense, wishes)
        row["agreement"] = asdict(estimate(same.tolist(), people))
        row["agreement_forced"] = asdict(
            estimate(
                forced_agreement(painter, cell.cache, wishes[:_FORCED], dense["tokens"][:_FORCED]),
                people[:_FORCED],
            )
        )
        row["psnr"] = asdict(estimate(psnr(found["pictures"], dense["pictures"]).tolist(), people))
    return row


def forced_agreement(
    painter: TorchPainter, cache: CacheSettings, wishes: Sequence[Wish], tokens: Tensor
) -> list[float]:
    """Share of each image's tokens that are drawn as in `tokens` [B, K] when all before them are those."""
    sampling = painter.sampling
    features, valid = painter.captions([wish.caption for wish in wishes])
    generators = [Generator().manual_seed(wish.seed) for wish in wishes]
    decoding = Decoding(painter.gpt, cache, features, valid, guided=sampling.guidance_scale > 1)
    logits = decoding.prefill()
    same = torch.zeros(len(wishes))
    for column in tokens.T:
        same += draw_token(guide(logits, sampling.guidance_scale), sampling, generators) == column
        if decoding.position < painter.gpt.config.length - 1:
            logits = decoding.step(column)
    return (same / tokens.shape[1]).tolist()


def _drawn(wishes: Sequence[Wish], measures: Measures) -> dict[str, Any]:
    """The same measures of drawn photos with these captions: what a perfect model would have."""
    from proteus_deploy.training.avatars import make_photo
    from proteus_deploy.training.tiny_portrait.configs import SIDE

    photos = np.stack([make_photo(wish.person, wish.photo, SIDE).image for wish in wishes])
    found = measures.of(photos, wishes)
    return {**summarise(found, wishes), "distance": measures.distance(found["features"])}


def _line(row: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {row[name]['mean']:.4g}" for name in ("identity", "scene", "text"))
    return f"{row['name']}: {shown}, distance {row['distance']['value']:.4g}"


if __name__ == "__main__":
    raise SystemExit(main())
