"""`train --preset tiny-portrait`: the tiny portrait model, from nothing but the tiny text encoder.

    folder/
        work/        drawn photos, states, logs
        checkpoint/  the portrait checkpoint (portrait/checkpoint.py has the layout)

Each part is skipped when it is done and goes on where it stopped when it isn't, so the same command is given
again after an interruption.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from proteus_deploy._files import atomic_directory, write_json
from proteus_deploy.portrait.captions import CaptionEncoder
from proteus_deploy.portrait.checkpoint import DOCUMENT
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.tiny.trained import MODEL
from proteus_deploy.training.tiny_model.fitting import FitSettings
from proteus_deploy.training.tiny_portrait.configs import CACHE, GPT, SAMPLING, VQ
from proteus_deploy.training.tiny_portrait.decoder import DECODER_SETTINGS, encode_photos, train_decoder
from proteus_deploy.training.tiny_portrait.drawn_photos import draw_photos
from proteus_deploy.training.tiny_portrait.tokenizer import CODE_SETTINGS, SMOOTH_SETTINGS, train_tokenizer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["train_tiny_portrait"]

_PHOTOS = 8_000  # of the tokenizer
_PEOPLE = 16_000  # of the decoder, a photo each


def train_tiny_portrait(
    folder: Path,
    *,
    smooth: FitSettings = SMOOTH_SETTINGS,
    codes: FitSettings = CODE_SETTINGS,
    decoder: FitSettings = DECODER_SETTINGS,
    photos: int = _PHOTOS,
    people: int = _PEOPLE,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Path:
    """Make the model in `folder`; return the folder of its checkpoint.

    smooth, codes, decoder: how the parts are trained. photos, people: how many the tokenizer and the decoder
    learn from. Everything runs on the CPU. Raises Cancelled once `cancel` is set: the same call goes on.
    """
    work, checkpoint = folder / "work", folder / "checkpoint"
    if checkpoint.is_dir():
        report("tiny portrait model", 1, 1)
        return checkpoint
    drawn, faces = draw_photos(work / "photos", max(photos, people), report=report)
    vq = train_tokenizer(
        work / "vq", drawn[:photos], faces[:photos], smooth=smooth, codes=codes, report=report, cancel=cancel
    )
    captions = CaptionEncoder(
        MODEL / "text_encoder", MODEL / "tokenizer", length=GPT.cls_token_num, width=GPT.caption_dim
    )
    encoded = encode_photos(work / "photos", drawn[:people], vq, captions, report=report, cancel=cancel)
    gpt = train_decoder(work / "gpt", encoded, settings=decoder, report=report, cancel=cancel)
    with atomic_directory(checkpoint) as new:
        for name, network in (("gpt", gpt), ("vq", vq)):
            _save(network, new / f"{name}.safetensors")
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(MODEL / name, new / name)
        document = {
            "gpt": asdict(GPT),
            "vq": asdict(VQ),
            "gpt_file": "gpt.safetensors",
            "vq_file": "vq.safetensors",
            "text_encoder": "text_encoder",
            "tokenizer": "tokenizer",
            "sampling": asdict(SAMPLING),
            "cache": asdict(CACHE),
        }
        write_json(new / DOCUMENT, document)
    return checkpoint


def _save(network: nn.Module, file: Path) -> None:
    """In float16, as the tiny model's other weights."""
    from safetensors.torch import save_file

    weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, file, {"format": "pt"})
