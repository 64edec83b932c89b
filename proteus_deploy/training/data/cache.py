"""Encoded clips on disk, and as a map-style dataset.

    KEY.safetensors      one clip; KEY is the hash of its content, the settings and the networks
    KEY.rejected.json    one clip that was left out, so that the next run needn't look again
    NAME.json            a set: which clips it has, in order, the settings and the report

One folder can hold several sets; clips that they share are there once.

Axes: B clips, T latent frames of C channels and h x w; R reference photos, K variants of the condition
noise; L and P tokens of prompt and identity prompt, d wide; c numbers of the identity vector; N tokens of the
image tower, W wide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from proteus_deploy._files import atomic_file, inside, write_json
from proteus_deploy.errors import InputError
from proteus_deploy.training.data.report import DataReport, Note
from proteus_deploy.weights import read_json

__all__ = [
    "CLIP_SUFFIX",
    "FORMAT",
    "LatentDataset",
    "PreparedClip",
    "PreparedSet",
    "collate",
    "read_clip_facts",
    "write_clip",
]

FORMAT = 1
CLIP_SUFFIX = ".safetensors"
_METADATA = "proteus_deploy"
_PER_REFERENCE = ("id_cond", "image_states")
_PER_VARIANT = ("condition", "keypoint_condition")


@dataclass(frozen=True)
class PreparedClip:
    """One clip of a set: its name in the source, its file, and how many reference photos it has."""

    name: str
    file: Path
    references: int


@dataclass(frozen=True)
class PreparedSet:
    """The clips of one source, encoded. encoded: how many of them this run encoded, 0 when opened."""

    folder: Path
    name: str
    clips: tuple[PreparedClip, ...]
    report: DataReport
    settings: Mapping[str, Any]
    encoded: int = 0

    def __len__(self) -> int:
        return len(self.clips)

    def save(self) -> Path:
        """Write NAME.json in the folder and return its path."""
        file = _index_file(self.folder, self.name)
        document = {
            "format": FORMAT,
            "clips": [
                {"name": clip.name, "file": clip.file.name, "references": clip.references}
                for clip in self.clips
            ],
            "settings": dict(self.settings),
            "report": self.report.document(),
        }
        write_json(file, document)
        return file

    @classmethod
    def open(cls, folder: str | Path, name: str = "train") -> PreparedSet:
        """Raises InputError when the set isn't there, isn't one, or a file of it is missing."""
        folder = Path(folder)
        file = _index_file(folder, name)
        if not file.is_file():
            there = sorted(path.stem for path in folder.glob("*.json") if not path.stem.endswith(".rejected"))
            raise InputError(
                f"{folder} has no prepared set {name!r} (there are: {', '.join(there) or 'none'}); "
                "prepare the clips first"
            )
        document = read_json(file, error=InputError)
        try:
            if document["format"] != FORMAT:
                raise InputError(f"{file} has format {document['format']}, this version reads {FORMAT}")
            clips = tuple(
                PreparedClip(str(one["name"]), inside(folder, str(one["file"])), int(one["references"]))
                for one in document["clips"]
            )
            report, settings = DataReport.from_document(document["report"]), dict(document["settings"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} is no prepared set ({error!r}); prepare the clips again") from error
        missing = [clip.file.name for clip in clips if not clip.file.is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(clips)} clips of {file} are gone, {missing[0]} first; "
                "prepare the clips again"
            )
        return cls(folder, name, clips, report, settings)


def write_clip(file: Path, tensors: Mapping[str, Tensor], notes: Sequence[Note]) -> None:
    """One clip, whole or not at all."""
    from safetensors.torch import save_file

    facts = {
        "format": FORMAT,
        "notes": [note.value for note in notes],
        "references": len(tensors["condition"]),
    }
    with atomic_file(file) as temporary:
        save_file(dict(tensors), temporary, {_METADATA: json.dumps(facts, sort_keys=True)})


def read_clip_facts(file: Path) -> tuple[int, tuple[Note, ...]] | None:
    """Reference photos and notes of a clip; None where there is no file, or none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads((opened.metadata() or {})[_METADATA])
        return int(facts["references"]), tuple(Note(note) for note in facts["notes"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


class LatentDataset(Dataset[dict[str, Tensor]]):
    """Encoded clips as tensors, all float32 on the CPU:

    latent_mean, latent_std [T, C, h, w]: the posterior, scaled; x0 = mean + std * n is what the published
        training draws anew each time.
    prompt [L, d], prompt_mask [L]; identity [P, d], identity_mask [P]: masks 1 on tokens, 0 on padding.
    condition [R, K, C, h, w]: for latent frame 0, scaled; every other frame of the condition is zeros, except
        frame 1 where there is keypoint_condition [R, K, C, h, w].
    id_cond [R, 1, c], image_states [R, 5, N, W]: as in IdentityFeatures.
    heat [T, h, w]: of `clip_heat`, in [0, 1]. head_mask, face_mask [T, h, w]: the share of each latent's
        pixels that lie inside; all zeros where the clip came without.

    source: a PreparedSet, or the folder of one, whose `name` is then needed. in_memory: read all clips now
    and keep them, in the precision of the files. Raises InputError as PreparedSet.open does.
    """

    def __init__(
        self, source: PreparedSet | str | Path, *, name: str = "train", in_memory: bool = False
    ) -> None:
        self.prepared = source if isinstance(source, PreparedSet) else PreparedSet.open(source, name)
        self._kept = [_read(clip.file) for clip in self.prepared.clips] if in_memory else None

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        stored = self._kept[index] if self._kept is not None else _read(self.prepared.clips[index].file)
        # A copy in any case: who changes a sample must not change what is kept.
        sample = {key: value.to(torch.float32, copy=True) for key, value in stored.items()}
        for key in ("head_mask", "face_mask"):
            sample.setdefault(key, torch.zeros_like(sample["heat"]))
        return sample


def collate(samples: Sequence[Mapping[str, Tensor]], choices: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """One batch: the tensors of `LatentDataset` with B in front, one reference and one variant of each clip.

    choices: for each clip which reference photo and which variant of its noise, whole numbers of at least 0,
    taken modulo the clip's R and K, so that one draw serves clips with different numbers of photos. Then
    condition is [B, C, h, w], id_cond [B, 1, c] and image_states [B, 5, N, W].

    Raises InputError where the numbers of samples and choices differ, or the clips' sizes do.
    """
    if not samples or len(samples) != len(choices):
        raise InputError(f"{len(samples)} samples and {len(choices)} choices; give one choice for each")
    chosen = [_choose(sample, *choice) for sample, choice in zip(samples, choices, strict=True)]
    batch = {}
    for key, first in chosen[0].items():
        shapes = {tuple(sample[key].shape) if key in sample else None for sample in chosen}
        if shapes != {tuple(first.shape)}:
            raise InputError(
                f"{key} differs in shape between the clips of a batch ({sorted(map(str, shapes))}); "
                "prepare them with one size, length and settings"
            )
        batch[key] = torch.stack([sample[key] for sample in chosen])
    return batch


def _choose(sample: Mapping[str, Tensor], reference: int, variant: int) -> dict[str, Tensor]:
    if min(reference, variant) < 0:
        raise InputError(f"the choice is ({reference}, {variant}); whole numbers from 0 on are taken")
    photo = reference % sample["condition"].shape[0]
    chosen = dict(sample)
    for key in _PER_REFERENCE:
        chosen[key] = sample[key][photo]
    for key in _PER_VARIANT:
        if key in sample:
            chosen[key] = sample[key][photo, variant % sample[key].shape[1]]
    return chosen


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} can't be read ({error}); remove it and prepare the clips again") from error


def _index_file(folder: Path, name: str) -> Path:
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError(f"{name!r} is no name for a set; use letters and digits")
    return folder / f"{name}.json"
