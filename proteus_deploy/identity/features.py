"""What the rest of the pipeline knows about a person.

Axes: B photos, N tokens (577 at the real size: one class token and 24 x 24 patches), W tower width
(1024), C = 512 + 768 = 1280 (recogniser and image tower, concatenated).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["HIDDEN_STATES", "IdentityFeatures"]

HIDDEN_STATES = 5


@dataclass(frozen=True, eq=False)
class IdentityFeatures:
    """Identity features of B photos; every tensor is checked when the object is made.

    id_cond: float [B, 1, C], the recogniser's vector as it comes, not normalised (norm about 20), followed
        by the image tower's pooled vector of norm 1.
    id_vit_hidden: five float tensors [B, N, W] of the image tower, shallow to deep.
    keypoints: None, or float [5, 2] (B = 1) or [B, 5, 2]: x, y in pixels of the condition image (the
        aligned 512 x 512 crop), eyes, nose, mouth corners. Points of the original photo do not belong here.

    Raises InputError naming the tensor, what was found and what is expected.
    """

    id_cond: torch.Tensor
    id_vit_hidden: tuple[torch.Tensor, ...]
    keypoints: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # A list is accepted, a tuple is kept: the object stays unchangeable.
        object.__setattr__(self, "id_vit_hidden", tuple(self.id_vit_hidden))
        _check_tensor("id_cond", self.id_cond, "[B, 1, C]", 3)
        if self.id_cond.shape[1] != 1:
            raise InputError(
                f"id_cond has shape {_shape(self.id_cond)}; expected [B, 1, C]: one vector a photo"
            )
        if len(self.id_vit_hidden) != HIDDEN_STATES:
            raise InputError(
                f"id_vit_hidden has {len(self.id_vit_hidden)} tensors; expected {HIDDEN_STATES}, "
                "the image tower's hidden states from shallow to deep"
            )
        for index, state in enumerate(self.id_vit_hidden):
            _check_tensor(f"id_vit_hidden[{index}]", state, "[B, N, W]", 3)
            if state.shape != self.id_vit_hidden[0].shape:
                raise InputError(
                    f"id_vit_hidden[{index}] has shape {_shape(state)} but id_vit_hidden[0] has "
                    f"{_shape(self.id_vit_hidden[0])}; the five states come from one tower and agree in shape"
                )
        if self.id_vit_hidden[0].shape[0] != self.batch:
            raise InputError(
                f"id_cond holds {self.batch} photos and id_vit_hidden {self.id_vit_hidden[0].shape[0]}; "
                "both must hold the same photos"
            )
        if self.keypoints is not None:
            self._check_keypoints(self.keypoints)

    def _check_keypoints(self, keypoints: torch.Tensor) -> None:
        expected = "[5, 2]" if self.batch == 1 else f"[{self.batch}, 5, 2]"
        rank = getattr(keypoints, "ndim", 0)
        _check_tensor("keypoints", keypoints, expected, rank)
        allowed = [(self.batch, 5, 2)] + ([(5, 2)] if self.batch == 1 else [])
        if tuple(keypoints.shape) not in allowed:
            raise InputError(
                f"keypoints has shape {_shape(keypoints)}; expected {expected}: x, y of eyes, nose and "
                "mouth corners in pixels of the condition image"
            )

    @property
    def batch(self) -> int:
        """Number of photos, B."""
        return int(self.id_cond.shape[0])

    def to(self, dtype: torch.dtype) -> IdentityFeatures:
        """The same features in `dtype`, a floating type; keypoints stay as they are, being pixels."""
        if not dtype.is_floating_point:
            raise InputError(f"identity features can't be held as {dtype}; choose a floating type")
        return IdentityFeatures(
            self.id_cond.to(dtype), tuple(state.to(dtype) for state in self.id_vit_hidden), self.keypoints
        )

    @staticmethod
    def stack(features: Sequence[IdentityFeatures]) -> IdentityFeatures:
        """Put several photos in one batch, in the order given.

        Keypoints are kept as [B, 5, 2] when every item has them, and None when none has.
        Raises InputError for an empty list, for sizes that differ, and when only some have keypoints.
        """
        import torch

        if not features:
            raise InputError("stack() was given no features; pass at least one")
        first = features[0]
        for index, item in enumerate(features):
            for name, one, other in (
                ("id_cond", first.id_cond, item.id_cond),
                ("id_vit_hidden", first.id_vit_hidden[0], item.id_vit_hidden[0]),
            ):
                if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
                    raise InputError(
                        f"features[{index}].{name} is {other.dtype} {_shape(other)} and features[0].{name} "
                        f"{one.dtype} {_shape(one)}; only features of one model and one dtype can be stacked"
                    )
        with_points = [item.keypoints.reshape(-1, 5, 2) for item in features if item.keypoints is not None]
        if with_points and len(with_points) != len(features):
            raise InputError(
                f"{len(with_points)} of {len(features)} features have keypoints; all must have them, or none"
            )
        return IdentityFeatures(
            torch.cat([item.id_cond for item in features]),
            tuple(
                torch.cat([item.id_vit_hidden[depth] for item in features]) for depth in range(HIDDEN_STATES)
            ),
            torch.cat(with_points) if with_points else None,
        )


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _check_tensor(name: str, value: object, expected: str, rank: int) -> None:
    """Raise InputError unless `value` is a finite, floating, non-empty tensor with `rank` axes."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a float tensor {expected}")
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}; expected a floating type, float32 as a rule")
    if value.ndim != rank or value.numel() == 0:
        raise InputError(f"{name} has shape {_shape(value)}; expected {expected}, nothing empty")
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise InputError(
            f"{name} holds {bad} values that are not finite, of {value.numel()}; "
            "check the photo and the face weights it was computed with"
        )
