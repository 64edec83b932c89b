"""The tiny model's face parser: BiSeNet, trained on aligned photos of avatars.

Four of CelebAMask-HQ's nineteen labels occur: background, skin, cloth, and hair for all of the head that is
no face. Axes: B faces, P pixels of each that are compared, S side of the crop, 512 pixels as in the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from proteus_deploy._files import atomic_file
from proteus_deploy.identity.alignment import CROP_SIZE
from proteus_deploy.identity.encoder import FACE_FOLDER, PARSER_NAME, normalise_parser_input
from proteus_deploy.identity.face_parser import BiSeNet, BiSeNetSizes
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.tiny_model.aligned_faces import (
    BACKGROUND,
    HEAD,
    DrawnPhotos,
    align_batch,
    draw_photos,
)
from proteus_deploy.training.tiny_model.attribute_heads import same_first_weights
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit, step_generator

__all__ = ["LABEL_OF_PART", "PARSER_SIZES", "train_face_parser"]

PARSER_SIZES = BiSeNetSizes(stages=(8, 16, 48, 64), context=32, fusion=32, gate=8, head=32)
# CelebAMask-HQ: 0 background, 16 cloth, 17 hair, 1 skin. In the order of the parts of `aligned_faces`.
LABEL_OF_PART = (0, 16, 17, 1)

_PEOPLE, _PHOTO_SIZE = 600, 400
_BATCH = 6
_CELL = 4  # pixels; points are drawn by cells
_POINTS = 4000
# Cells on an edge between parts are drawn this much oftener: that's where labels are wrong.
_EDGE_WEIGHT = 6.0
_SETTLING_BATCHES = 30
# Shares of the photos in which hair and wall get other colours: few avatars have white or pink hair.
_NEW_HAIR, _NEW_WALL = 0.5, 0.3


def train_face_parser(
    folder: Path, *, steps: int = 750, report: Report = no_report, cancel: Event | None = None
) -> Path:
    """Write `folder/face_encoder/parsing_bisenet.safetensors` and return its path.

    Photos lie in `folder/photos/`, states of the training in `folder/fits/`. Raises as `fit` does.
    """
    photos = draw_photos(folder / "photos", _PEOPLE, 1, _PHOTO_SIZE, report=report)
    with same_first_weights(3):
        parser = BiSeNet(PARSER_SIZES)
        _scale_first_weights(parser)

    def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        faces, labels = _batch(photos, generator)
        places = _drawn_places(labels, generator)
        return _point_loss(_coarse_logits(parser, faces), labels, places)

    settings = FitSettings(steps=steps, learning_rate=4e-3, weight_decay=1e-3, seed=3)
    fit(parser, loss, settings, folder=folder / "fits", name="face_parser", report=report, cancel=cancel)
    _settle_norms(parser, photos)
    return _write(folder / FACE_FOLDER / PARSER_NAME, parser)


def _batch(photos: DrawnPhotos, generator: Generator) -> tuple[Tensor, Tensor]:
    """Normalised faces [B, 3, S, S] and CelebAMask-HQ labels int64 [B, S, S]."""
    chosen = torch.randint(len(photos.images), (_BATCH,), generator=generator)
    pixels, parts = align_batch(photos, chosen, CROP_SIZE, generator)
    _recolour(pixels, parts == HEAD, _NEW_HAIR, generator)
    _recolour(pixels, parts == BACKGROUND, _NEW_WALL, generator)
    labels = torch.tensor(LABEL_OF_PART)[parts]
    return normalise_parser_input(_another_camera(pixels, generator)), labels


def _recolour(pixels: Tensor, where: Tensor, share: float, generator: Generator) -> None:
    """Give `where` [B, S, S] another colour in a `share` of the images, in place; light and shadow stay."""
    for image, mask in zip(pixels, where, strict=True):
        # Anything from grey to the full colour: hair is white, grey and black too.
        colour = torch.lerp(torch.ones(3), torch.rand(3, generator=generator), _drawn(generator))
        colour = colour / colour.amax() * (0.2 + 0.8 * _drawn(generator))
        if _drawn(generator) >= share or not mask.any():
            continue
        grey = image[:, mask].mean(dim=0)
        shade = (grey / grey.mean().clamp(min=0.02)).clamp(0.3, 1.7)
        image[:, mask] = (colour[:, None] * shade).clamp(0, 1)


def _drawn(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))


def _another_camera(pixels: Tensor, generator: Generator) -> Tensor:
    """Other light and colours, less sharpness, some noise; in 0..1, as `pixels` [B, 3, S, S]."""
    count = len(pixels)
    if torch.rand((), generator=generator) < 0.4:
        side = int(torch.randint(110, CROP_SIZE, (), generator=generator))
        small = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        pixels = functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    gains = 1 + 0.12 * torch.randn(count, 1, 1, 1, generator=generator)
    tints = 1 + 0.04 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = torch.randn(pixels.shape, generator=generator)
    noise = noise * (0.02 * torch.rand(count, 1, 1, 1, generator=generator))
    return (pixels * gains * tints + noise).clamp(0, 1)


def _coarse_logits(parser: BiSeNet, faces: Tensor) -> Tensor:
    """Logits [B, 19, S / 8, S / 8], before the parser enlarges them."""
    spatial, context = parser.cp(faces)
    logits: Tensor = parser.conv_out(parser.ffm(spatial, context))
    return logits


def _drawn_places(labels: Tensor, generator: Generator) -> Tensor:
    """int64 [B, P]: numbers of pixels, row by row, oftener near edges between labels."""
    side = labels.shape[-1]
    cells = labels[:, None].float()
    edges = functional.max_pool2d(cells, _CELL + 4, _CELL, padding=2) != -functional.max_pool2d(
        -cells, _CELL + 4, _CELL, padding=2
    )
    weights = 1 + (_EDGE_WEIGHT - 1) * edges.flatten(1).float()
    drawn = torch.multinomial(weights, _POINTS, replacement=True, generator=generator)
    offsets = torch.randint(_CELL, (2, *drawn.shape), generator=generator)
    row = drawn // (side // _CELL) * _CELL + offsets[0]
    column = drawn % (side // _CELL) * _CELL + offsets[1]
    return row * side + column


def _point_loss(coarse: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Mapping[str, float]]:
    """Cross entropy at chosen pixels of the enlarged logits, without enlarging them all."""
    logits = _enlarged_at(coarse, places, labels.shape[-1])
    expected = labels.flatten(1).gather(1, places)
    right = float((logits.argmax(dim=1) == expected).float().mean())
    return functional.cross_entropy(logits, expected), {"right": right}


def _enlarged_at(coarse: Tensor, places: Tensor, side: int) -> Tensor:
    """[B, C, P]: `coarse` [B, C, h, h] at pixels of its enlargement to `side`, as `interpolate` with aligned
    corners would give them.
    """
    small = coarse.shape[-1]
    ratio = (small - 1) / (side - 1)
    flat = coarse.flatten(2)
    row, column = places // side * ratio, places % side * ratio
    top, left = row.long().clamp(max=small - 2), column.long().clamp(max=small - 2)
    down, across = (row - top)[:, None], (column - left)[:, None]

    def corner(below: int, right: int) -> Tensor:
        index = (top + below) * small + left + right
        return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))

    upper = torch.lerp(corner(0, 0), corner(0, 1), across)
    return torch.lerp(upper, torch.lerp(corner(1, 0), corner(1, 1), across), down)


def _scale_first_weights(parser: nn.Module) -> None:
    for module in parser.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def _settle_norms(parser: BiSeNet, photos: DrawnPhotos) -> None:
    """Measure the batch norms' statistics anew: the averaged weights never ran while training."""
    norms = [module for module in parser.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    parser.train()
    for number in range(_SETTLING_BATCHES):
        parser.cp.train()
        _coarse_logits(parser, _batch(photos, step_generator(4, number))[0])
    parser.eval()


def _write(path: Path, parser: BiSeNet) -> Path:
    from safetensors.torch import save_file

    tensors = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in sorted(parser.state_dict().items())
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path
