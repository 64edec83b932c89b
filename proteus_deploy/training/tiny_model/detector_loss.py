"""What the face detector's anchors should say, and the loss of what they say.

N anchors (all cells of all strides, two in each), K faces at most on one canvas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from proteus_deploy.training.tiny_model.detector_canvases import CANVAS, POOLED, LabelledCanvas

__all__ = ["ANCHORS", "anchor_places", "assign_faces", "detector_loss", "encode_faces"]

# Strides of the 640-pixel input, and the sizes of faces (roots of areas) that their two anchors are for.
ANCHORS: dict[int, tuple[float, float]] = {8: (40.0, 64.0), 16: (102.0, 163.0), 32: (260.0, 415.0)}
# A face belongs to the anchors nearest to its size, and to cells near its middle. Those a little further off
# learn its places as well, since they win at times; up to the last factor, either answer is right.
_SIZE_FACTOR, _NEAR_FACTOR, _LOOSE_FACTOR = 1.32, 1.5, 1.9
_MIDDLE, _NEAR_MIDDLE, _LOOSE_MIDDLE = 0.17, 0.24, 0.42
_SMOOTH = 0.02
_BOX_WEIGHT, _LANDMARK_WEIGHT = 2.0, 10.0


def anchor_places() -> tuple[Tensor, Tensor]:
    """Corners of the cells, float32 [N, 2] (x, y), and sizes of the anchors, float32 [N]; in input pixels."""
    corners, sizes = [], []
    for stride, bases in ANCHORS.items():
        steps = torch.arange(CANVAS * POOLED // stride, dtype=torch.float32) * stride
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        corners.append(torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, 2, 2).reshape(-1, 2))
        sizes.append(torch.tensor(bases).repeat(len(steps) ** 2))
    return torch.cat(corners), torch.cat(sizes)


def encode_faces(points: Tensor, corners: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [M, 4] (left, up, right, down) and landmarks [M, 10] as distances in sizes of the anchor.

    points: [M, 7, 2], corners of the box and landmarks. corners: [M, 2], of the cells. sizes: [M].
    """
    offset = (points - corners[:, None]) / sizes[:, None, None]
    return torch.cat([-offset[:, 0], offset[:, 1]], dim=1), offset[:, 2:].flatten(1)


def assign_faces(canvas: LabelledCanvas, corners: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each anchor should say.

    int8 [N]: 1 face, 0 none, -1 either is right; bool [N]: whether it learns a face's places; int64 [N]:
    which face's. corners, sizes: see `anchor_places`.
    """
    label = torch.zeros(len(corners), dtype=torch.int8)
    near = torch.zeros(len(corners), dtype=torch.bool)
    index = torch.zeros(len(corners), dtype=torch.int64)
    for low, high in torch.from_numpy(canvas.unclear) * POOLED:
        label[((corners >= low) & (corners <= high)).all(dim=1)] = -1
    least, most = float(sizes.min()), float(sizes.max())
    for number, (low, high) in enumerate(torch.from_numpy(canvas.faces[:, :2]) * POOLED):
        size = float((high - low).prod().sqrt())
        # What is smaller than the smallest anchor or larger than the largest is still theirs.
        factor = (sizes / min(max(size, least), most)).log().abs().exp()
        away = (corners - (low + high) / 2).abs().amax(dim=1) / size
        label[(factor < _LOOSE_FACTOR) & (away < _LOOSE_MIDDLE)] = -1
        label[(factor < _SIZE_FACTOR) & (away < _MIDDLE)] = 1
        places = (factor < _NEAR_FACTOR) & (away < _NEAR_MIDDLE)
        near |= places
        index[places] = number
    return label, near, index


def detector_loss(
    found: tuple[Tensor, Tensor, Tensor], canvases: list[LabelledCanvas]
) -> tuple[Tensor, dict[str, float]]:
    """Focal loss of the scores, smooth L1 of boxes and landmarks in sizes of the anchor."""
    scores, boxes, landmarks = found
    corners, sizes = anchor_places()
    wanted, face, marked = [], [], []
    for canvas in canvases:
        label, near, index = assign_faces(canvas, corners, sizes)
        wanted.append(label)
        marked.append(near)
        points = torch.from_numpy(canvas.faces.reshape(-1, 7, 2)) * POOLED
        face.append(points[index[near]])
    label, near = torch.stack(wanted), torch.stack(marked)
    chance = scores.sigmoid()
    focal = torch.where(label == 1, (1 - chance) ** 2 * F.softplus(-scores), chance**2 * F.softplus(scores))
    count = max(1, int((label == 1).sum()))
    score_loss = focal[label >= 0].sum() / count

    points = torch.cat(face)
    base = sizes.expand_as(near)[near]
    box, marks = encode_faces(points, corners.expand(*near.shape, 2)[near], base)
    kept = max(1, len(points))
    box_loss = F.smooth_l1_loss(boxes[near], box, beta=_SMOOTH, reduction="sum") / (4 * kept)
    mark_loss = F.smooth_l1_loss(landmarks[near], marks, beta=_SMOOTH, reduction="sum") / (10 * kept)
    total = score_loss + _BOX_WEIGHT * box_loss + _LANDMARK_WEIGHT * mark_loss
    numbers = {"score": score_loss, "box": box_loss, "landmarks": mark_loss}
    return total, {key: float(value.detach()) for key, value in numbers.items()}
