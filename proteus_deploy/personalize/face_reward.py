"""How much the faces of frames look like the photo's, with gradients to the pixels.

Faces are found by a detector without gradients; crops and recognisers carry them. The recognisers are the one
of the checkpoint's face_encoder (published: glintr100, an ArcFace network trained on Glint360K, which is what
PersonalVideo rewards with), the CurricularFace network of the encoders, or both: a change that pleases two
networks is more likely to please a third. FaceSim by the ArcFace network of the encoders (`face_sim_arc`) is
never among them, so it remains a measure.

Axes: K frames, V crops of each, d numbers of an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor, nn

from proteus_deploy._files import sha256_of
from proteus_deploy.evaluate.face_similarity import (
    embed_crops,
    face_embeddings,
    face_similarity,
    photo_embeddings,
)
from proteus_deploy.evaluate.ir_backbone import INPUT_SIDE
from proteus_deploy.identity.alignment import similarity_between
from proteus_deploy.identity.faces import RECOGNISER_TEMPLATE
from proteus_deploy.personalize.face_crop import warp_faces
from proteus_deploy.personalize.rewards import identity_loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_deploy.evaluate.face_similarity import FacePack

__all__ = ["FaceReward"]

# Standard deviations of what differs between views of one face, on its crop of 112 pixels.
_TURN = 0.06  # radians
_LOG_SCALE = 0.06
_SHIFT = 3.0  # pixels
_LOG_GAIN = 0.08  # of each colour
_BRIGHTNESS = 0.04


class FaceReward:
    """recognisers: by name, each [B, 3, 112, 112] in [-1, 1] -> [B, d]. pack: the detector. faces: frames
    looked at in each video; views: differing crops of each face.

    Raises PhotoError for a photo without a face.
    """

    def __init__(
        self,
        pack: FacePack,
        recognisers: Mapping[str, nn.Module],
        photo: NDArray[np.uint8],
        *,
        faces: int,
        views: int,
    ) -> None:
        self._pack, self._faces, self._views = pack, faces, views
        self._recognisers = {
            name: network.eval().requires_grad_(False) for name, network in recognisers.items()
        }
        crops = photo_embeddings(photo, pack).crops
        self._references = {
            name: torch.from_numpy(embed_crops(network, crops)[0])
            for name, network in self._recognisers.items()
        }

    @property
    def hash(self) -> str:
        """sha256 over the recognisers' weights and the files of the detector's pack."""
        digest = hashlib.sha256()
        for file in sorted(self._pack.folder.glob("*.onnx")):
            digest.update(sha256_of(file).encode())
        for recogniser, network in sorted(self._recognisers.items()):
            for name, value in sorted(network.state_dict().items()):
                digest.update(f"{recogniser} {name}".encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def loss(self, frames: Tensor, generator: Generator) -> Tensor | None:
        """1 - cosine of some of the frames [K, 3, H, W] in [0, 1], mean over recognisers and crops.

        None without a face. Which frames, and how their views differ, comes from the generator.
        """
        chosen = torch.randperm(len(frames), generator=generator)[: self._faces].tolist()
        kept, warps = [], []
        for index in chosen:
            landmarks = self._pack.landmarks(_picture(frames[index]))
            if landmarks is not None:
                kept += [index] * self._views
                warps += [similarity_between(landmarks, np.asarray(RECOGNISER_TEMPLATE))] * self._views
        if not kept:
            return None
        crops = warp_faces(frames[kept], _differing(np.stack(warps), generator), INPUT_SIDE)
        crops = _tinted(crops, generator)
        mirrored = torch.rand(len(crops), generator=generator) < 0.5
        crops = torch.where(mirrored[:, None, None, None].to(crops.device), crops.flip(-1), crops)
        losses = [
            identity_loss(self._references[name].to(crops.device), network((crops - 0.5) / 0.5))
            for name, network in self._recognisers.items()
        ]
        return torch.stack(losses).mean()

    def similarity(self, frames: NDArray[np.uint8]) -> float:
        """Mean cosine over recognisers and sampled frames of a video, uint8 [F, H, W, 3].

        A frame without a face counts 0: who hides the face gains nothing. With one in each, this is
        `face_sim_cur` of `evaluate` for CurricularFace.
        """
        found = face_embeddings(frames, self._pack)
        cosines = [
            face_similarity(
                self._references[name].numpy()[None], embed_crops(network, found.crops), clipped=False
            )
            for name, network in self._recognisers.items()
        ]
        return found.detection_rate * sum(cosines) / len(cosines)


def _picture(frame: Tensor) -> NDArray[np.uint8]:
    levels = (frame.detach() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


def _differing(warps: NDArray[np.float64], generator: Generator) -> Tensor:
    """Warps [K, 2, 3] followed each by a small turn, scale and shift about the middle of the crop."""
    normal = torch.randn(4, len(warps), generator=generator, dtype=torch.float64)
    angle, scale = normal[0] * _TURN, (normal[1] * _LOG_SCALE).exp()
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    turn = torch.stack((cosine, -sine, sine, cosine), dim=1).reshape(-1, 2, 2)
    middle = torch.full((2, 1), (INPUT_SIDE - 1) / 2, dtype=torch.float64)
    shift = middle - turn @ middle + normal[2:].T[:, :, None] * _SHIFT
    own = torch.as_tensor(warps)
    return torch.cat((turn @ own[:, :, :2], turn @ own[:, :, 2:] + shift), dim=2)


def _tinted(crops: Tensor, generator: Generator) -> Tensor:
    gains = (torch.randn(len(crops), 3, 1, 1, generator=generator) * _LOG_GAIN).exp()
    brightness = torch.randn(len(crops), 1, 1, 1, generator=generator) * _BRIGHTNESS
    return (crops * gains.to(crops.device) + brightness.to(crops.device)).clamp(0, 1)
