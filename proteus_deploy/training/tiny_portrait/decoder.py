"""The tiny decoder of code numbers, trained on drawn photos and their prompts.

The loss is the cross entropy of each of an image's tokens after those before it. A tenth of the captions is
replaced by the vector of no caption, without which guidance would have nothing to guide with.

Axes: B images, P positions of the caption, K tokens of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import Cancelled
from proteus_deploy.portrait.captions import CaptionEncoder
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.vq import VqModel
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.avatars import training_seed
from proteus_deploy.training.tiny_model.descriptions import describe_photo
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit
from proteus_deploy.training.tiny_portrait.configs import GPT
from proteus_deploy.training.tiny_portrait.drawn_photos import PHOTO_SEED
from proteus_deploy.training.tiny_portrait.tokenizer import pixels_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DECODER_SETTINGS", "EncodedPhotos", "encode_photos", "token_loss", "train_decoder"]

DECODER_SETTINGS = FitSettings(
    steps=3200,
    learning_rate=2e-3,
    warmup=100,
    betas=(0.9, 0.95),
    weight_decay=0.01,
    ema=0.998,
    optimiser="muon",
)
_BATCH = 24
_NO_CAPTION = 0.1
_CHUNK = 64
_AT_ONCE = 8  # what the tokenizer sees; more take longer on a CPU


@dataclass(frozen=True)
class EncodedPhotos:
    """tokens int16 [N, K]; features float16 [N, P, W]; valid bool [N, P]."""

    tokens: Tensor
    features: Tensor
    valid: Tensor


@torch.no_grad()
def encode_photos(
    folder: Path,
    photos: NDArray[np.uint8],
    vq: VqModel,
    captions: CaptionEncoder,
    *,
    report: Report = no_report,
    cancel: Event | None = None,
) -> EncodedPhotos:
    """Photos uint8 [N, H, W, 3] of the first N training people as tokens and features.

    The file in `folder` is kept. Raises Cancelled once `cancel` is set; nothing is kept then.
    """
    from safetensors.torch import load_file, save_file

    count = len(photos)
    file = folder / f"encoded-{count}.safetensors"
    if not file.exists():
        tokens, features, valid = [], [], []
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                tokens += [vq.encode(some).short() for some in pixels_of(photos[start:stop]).split(_AT_ONCE)]
            words = [describe_photo(training_seed(index), PHOTO_SEED).prompt for index in range(start, stop)]
            found = captions(words)
            features.append(found[0].half())
            valid.append(found[1])
            report("encoding portraits", stop, count)
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"encoding was stopped at photo {stop} of {count}; it begins anew next time")
        tensors = {"tokens": torch.cat(tokens), "features": torch.cat(features), "valid": torch.cat(valid)}
        with atomic_file(file) as new:
            save_file(tensors, new)
    return EncodedPhotos(**load_file(file))


def train_decoder(
    folder: Path,
    photos: EncodedPhotos,
    *,
    settings: FitSettings = DECODER_SETTINGS,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Gpt:
    """Train in `folder` (see fitting.fit); returns the decoder in float32, eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        gpt = Gpt(GPT)
        for parameter in gpt.parameters():  # as published: normal with deviation 0.02, and a quiet last layer
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        torch.nn.init.zeros_(gpt.output.weight)

    def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        chosen = torch.randperm(len(photos.tokens), generator=generator)[:_BATCH]
        without = torch.rand(_BATCH, generator=generator) < _NO_CAPTION
        features = photos.features[chosen].float()
        features = torch.where(without[:, None, None], gpt.empty_condition(features), features)
        value = token_loss(gpt, photos.tokens[chosen].long(), features, photos.valid[chosen])
        return value, {}

    fit(gpt, loss, settings, folder=folder, name="gpt", report=report, cancel=cancel)
    return gpt


def token_loss(gpt: Gpt, tokens: Tensor, features: Tensor, valid: Tensor) -> Tensor:
    """Mean cross entropy in nats. tokens int64 [B, K]; features [B, P, W]; valid bool [B, P]."""
    prompt = gpt.config.cls_token_num
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = torch.cat([gpt.embed_condition(features), gpt.tok_embeddings(tokens[:, :-1])], dim=1)
        length = embedded.shape[1]
        before = torch.ones(length, length, dtype=torch.bool).tril()
        seen = functional.pad(valid, (0, length - prompt), value=True)
        mask = (before & seen[:, None]) | torch.eye(length, dtype=torch.bool)
        attention = [_ProductAttention(mask, gpt.config.n_head)] * gpt.config.n_layer
        logits = gpt(embedded, gpt.rotary[:length], attention)[:, prompt - 1 :]
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class _ProductAttention:
    """Attention by two products and a softmax: with its gradient, half the time of PyTorch's own on a CPU.

    mask: bool [B, N, N], True is seen.
    """

    def __init__(self, mask: Tensor, heads: int) -> None:
        bias = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, -torch.inf)
        self._bias = bias.repeat_interleave(heads, dim=0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query, key, value [B, H, N, D] -> [B, H, N, D]; the mask is its own."""
        assert mask is None
        scale = query.shape[-1] ** -0.5
        flat = [one.flatten(0, 1).bfloat16() for one in (query, key, value)]
        weights = torch.baddbmm(self._bias, flat[0], flat[1].transpose(1, 2), alpha=scale).softmax(dim=-1)
        out: Tensor = (weights @ flat[2]).unflatten(0, query.shape[:2])
        return out
