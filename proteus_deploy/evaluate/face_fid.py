"""The face "FID" of the ConsisID protocol, which compares single faces and no distributions.

Published, one crop of the photo is compared with one crop of a frame by the Fréchet formula

    ‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½).

Each side is a single feature vector written twice, so both covariances are zero, and what remains is the
squared distance ‖f_photo - f_frame‖². It is computed as such and averaged over the sampled frames that have
a face. Values are not comparable with an FID between sets of images.

Axes: K crops, D features, 224 x 224 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["FaceFeatures", "face_fid", "last_map_mean"]

_SIDE = 299
_BATCH = 16


class FaceFeatures:
    """Aligned crops -> feature vectors: each crop to 299 x 299 (bilinear), to [0, 1], through `network`.

    network: RGB float32 [B, 3, 299, 299] in [0, 1] -> [B, D]; published: Inception-V3, D = 2048.
    description: what the features are, for reports.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], *, description: str, device: str = "cpu") -> None:
        self._network, self._device = network, device
        self.description = description

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 [K, S, S, 3] -> float32 [K, D]."""
        import torch
        from PIL import Image

        if crops.ndim != 4 or crops.dtype != np.uint8 or not len(crops):
            raise InputError(
                f"crops are {crops.dtype} {list(crops.shape)}; expected uint8 [K, S, S, 3], K > 0"
            )
        resized = np.stack(
            [
                np.asarray(Image.fromarray(crop).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
                for crop in crops
            ]
        )
        batches = torch.from_numpy(resized).permute(0, 3, 1, 2).split(_BATCH)
        with torch.inference_mode():
            features = [
                self._network(batch.to(self._device).float() / 255).float().cpu() for batch in batches
            ]
        return np.asarray(torch.cat(features).numpy(), dtype=np.float32)


def last_map_mean(network: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], Tensor]:
    """Turn a network of feature maps into one of vectors: its last map, averaged over space."""

    def features(images: Tensor) -> Tensor:
        return network(images)[-1].mean(dim=(2, 3))

    return features


def face_fid(photo_crop: NDArray[np.uint8], crops: NDArray[np.uint8], features: FaceFeatures) -> float | None:
    """Mean over the frames' crops [K, 224, 224, 3] of ‖f_photo - f_frame‖²; lower is more alike.

    photo_crop: RGB uint8 [1, 224, 224, 3]. None when K is 0. (The published code then writes 0, which is
    the value of a perfect video.)
    """
    if not len(crops):
        return None
    difference = features(crops).astype(np.float64) - features(photo_crop).astype(np.float64)
    return float((difference**2).sum(axis=1).mean())
