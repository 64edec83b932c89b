"""Photo -> identity features and the condition image: the published recipe from end to end.

    photo --detect, choose one--> face --embed--> 512 numbers, as they come ─────────────┐
      └--align--> crop 512 x 512 --parse--> grey, background white --tower--> pooled, normalised ─┴─> id_cond
                    │                 │                                 └--> five hidden states
                    │                 └> colour, background white: the condition image
                    └> the landmarks through the same warp: keypoints

Axes: B = 1 photo; C = recogniser + pooled (512 + 768); S the tower's input side (336).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.identity.alignment import CROP_SIZE, align_face, transform_points
from proteus_deploy.identity.face_parser import LABELS, keep_face, load_face_parser
from proteus_deploy.identity.faces import Face, FaceDetector
from proteus_deploy.identity.features import HIDDEN_STATES, IdentityFeatures
from proteus_deploy.identity.image_tower import load_image_tower
from proteus_deploy.identity.photo import limit_long_edge, open_photo

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray

__all__ = [
    "FACE_FOLDER",
    "PARSER_NAME",
    "TOWER_NAME",
    "FaceStage",
    "IdentityEncoder",
    "normalise_parser_input",
    "normalise_tower_input",
    "weights_file",
]

FACE_FOLDER = "face_encoder"
TOWER_NAME = "EVA02_CLIP_L_336_psz14_s6B.safetensors"
PARSER_NAME = "parsing_bisenet.safetensors"
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin")

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class FaceStage(Protocol):
    """A network served by any backend: one named image in, named float tensors out."""

    def __call__(self, *, face: Tensor) -> Mapping[str, Tensor]: ...


class IdentityEncoder:
    """Composes a face detector, a face parser and an image tower.

    detector: finds, chooses and embeds the face.
    face_parser: face float [1, 3, 512, 512] -> {"logits": [1, 19, 512, 512]}.
    image_tower: face float [1, 3, S, S] -> {"pooled": [1, P], "hidden_0" .. "hidden_4": [1, N, W]}.
    tower_size: S, pixels; 336 in the published model.
    """

    def __init__(
        self, detector: FaceDetector, face_parser: FaceStage, image_tower: FaceStage, *, tower_size: int = 336
    ) -> None:
        if tower_size < 1:
            raise InputError(f"tower_size is {tower_size}; expected the side of the tower's input in pixels")
        self.detector = detector
        self.face_parser = face_parser
        self.image_tower = image_tower
        self.tower_size = tower_size

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> IdentityEncoder:
        """Load everything from `folder/face_encoder/`: the eager reference, float32, on the CPU.

        providers: onnxruntime execution providers of the detector and the recogniser.
        Raises CheckpointError naming the file that is missing or wrong; a pickle is never opened, and the
        message holds the command that converts it.
        """
        faces = Path(folder) / FACE_FOLDER
        if not faces.is_dir():
            raise CheckpointError(
                f"{faces} does not exist; a checkpoint that reads photos has a {FACE_FOLDER} folder with "
                f"{TOWER_NAME}, {PARSER_NAME} and models/antelopev2"
            )
        # All files are looked for before any is loaded: the answer should come at once.
        parser_file, tower_file = weights_file(faces, PARSER_NAME), weights_file(faces, TOWER_NAME)
        detector = FaceDetector(faces, providers=providers)
        tower = load_image_tower(tower_file)
        return cls(detector, load_face_parser(parser_file), tower, tower_size=tower.sizes.image_size)

    def encode(
        self,
        photo: str | Path | bytes | PIL.Image.Image | NDArray[np.generic],
        *,
        face_index: int | None = None,
    ) -> tuple[IdentityFeatures, NDArray[np.uint8]]:
        """Return the features (B = 1) and the condition image, RGB uint8 [512, 512, 3].

        photo: anything `open_photo` takes; it is shrunk to 1024 pixels on its long edge first, and boxes in
        error messages count pixels of that. face_index: which face, from the left, from 0; None takes the
        largest. The same photo gives the same bytes.
        Raises PhotoError when the photo can't be read or has no usable face.
        """
        return self.encode_face(*self.find_face(photo, face_index=face_index))

    def find_face(
        self,
        photo: str | Path | bytes | PIL.Image.Image | NDArray[np.generic],
        *,
        face_index: int | None = None,
    ) -> tuple[NDArray[np.uint8], Face]:
        """The photo as `encode` looks at it, RGB uint8 [H, W, 3], and the face in it; arguments as there."""
        image = limit_long_edge(open_photo(photo))
        return image, self.detector.choose(self.detector.detect(image), face_index)

    @torch.no_grad()
    def encode_face(self, image: NDArray[np.uint8], face: Face) -> tuple[IdentityFeatures, NDArray[np.uint8]]:
        """As `encode`, for a face already chosen in `image`, RGB uint8 [H, W, 3]."""
        embedding = torch.from_numpy(self.detector.embed(image, face))
        crop, warp = align_face(image, face.landmarks)
        pixels = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255.0

        logits = self.face_parser(face=normalise_parser_input(pixels))["logits"].float().cpu()
        if tuple(logits.shape) != (1, LABELS, CROP_SIZE, CROP_SIZE):
            raise CheckpointError(
                f"the face parser gave logits of shape {list(logits.shape)}; expected "
                f"{[1, LABELS, CROP_SIZE, CROP_SIZE]}"
            )
        grey, colour = keep_face(pixels, logits)

        outputs = self.image_tower(face=normalise_tower_input(grey, self.tower_size))
        pooled = outputs["pooled"].float().cpu()
        pooled = pooled / pooled.norm(dim=1, keepdim=True)
        features = IdentityFeatures(
            id_cond=torch.cat([embedding[None], pooled], dim=1)[:, None].clone(),
            id_vit_hidden=tuple(outputs[f"hidden_{depth}"].float().cpu() for depth in range(HIDDEN_STATES)),
            keypoints=torch.from_numpy(transform_points(warp, face.landmarks)),
        )
        # Truncated, not rounded, as published: some values come back one lower than they went in.
        condition = (colour[0].permute(1, 2, 0) * 255.0).to(torch.uint8).contiguous().numpy()
        return features, condition


def normalise_parser_input(pixels: Tensor) -> Tensor:
    """float [B, 3, H, W] in 0..1 -> the same shape, by the ImageNet mean and deviation."""
    return _normalise(pixels, _IMAGENET_MEAN, _IMAGENET_STD)


def normalise_tower_input(pixels: Tensor, side: int) -> Tensor:
    """float [B, 3, H, W] in 0..1 -> [B, 3, side, side]: bicubic with antialiasing, then the CLIP statistics.

    Bicubic overshoots a little; as published, nothing is clipped.
    """
    resized = functional.interpolate(
        pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=True
    )
    return _normalise(resized, _CLIP_MEAN, _CLIP_STD)


def weights_file(folder: Path, name: str) -> Path:
    """`folder / name`, which must exist.

    Raises CheckpointError; when only the published pickle is there, with the command that converts it.
    """
    path = folder / name
    if path.is_file():
        return path
    for suffix in _PICKLE_SUFFIXES:
        pickle = path.with_suffix(suffix)
        if pickle.is_file():
            raise CheckpointError(
                f"{pickle} is a pickle, and pickles are not loaded: they can run code. "
                f"Convert it once with: proteus-deploy convert {shlex.quote(str(pickle))}"
            )
    raise CheckpointError(f"{path} does not exist; copy it (or its published pickle, to convert) to {folder}")


def _normalise(pixels: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    means = pixels.new_tensor(mean)[None, :, None, None]
    deviations = pixels.new_tensor(deviation)[None, :, None, None]
    return (pixels - means) / deviations
