"""FaceSim: how much the person in a video looks like the person in the photo, by the ConsisID protocol.

    image --largest face--> (none? grey border of a quarter, once more) --> landmarks
      ├── ArcFace vector of the insightface pack                           face_sim_arc
      └── crop of 224 x 224 --> 112 --> CurricularFace vector, unit norm   face_sim_cur

16 frames are looked at. A frame without a face is skipped, so a video that loses the person for a while is
not punished for it; that is why the share of frames with a face stands beside the similarities.

Axes: F frames of the video, S sampled ones, K of those with a face, D numbers in a vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from proteus_deploy.errors import CheckpointError, InputError, PhotoError
from proteus_deploy.evaluate.frames import SAMPLES, check_frames, face_samples
from proteus_deploy.identity._packages import import_face_package
from proteus_deploy.identity.alignment import similarity_between
from proteus_deploy.identity.faces import RECOGNISER_TEMPLATE, load_pack

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

__all__ = [
    "CROP_SIDE",
    "FacePack",
    "MeasuredFace",
    "SampledFaces",
    "cosine_matrix",
    "embed_crops",
    "face_embeddings",
    "face_similarity",
    "photo_embeddings",
]

CROP_SIDE = 224
_DETECTOR_SIZE = (320, 320)
_PADDING = 0.25
_PADDING_GREY = (128, 128, 128)
_CPU = ("CPUExecutionProvider",)
_BACKBONE_SIDE = 112
_BACKBONE_BATCH = 16


@dataclass(frozen=True, eq=False)
class MeasuredFace:
    """The largest face of an image.

    embedding: float32 [D], the ArcFace vector as it comes, not normalised. crop: RGB uint8 [224, 224, 3],
    aligned; black where it leaves the image. padded: whether the face was found only with a grey border.
    """

    embedding: NDArray[np.float32]
    crop: NDArray[np.uint8]
    padded: bool


@dataclass(frozen=True, eq=False)
class SampledFaces:
    """What was found on the sampled frames of one video.

    indices: int64 [S], the frames looked at. seen: bool [S], whether a face was there. arc: float32 [K, D],
    ArcFace vectors as they come. cur: float32 [K, D], CurricularFace vectors of norm 1, or None without a
    backbone. crops: RGB uint8 [K, 224, 224, 3].
    """

    indices: NDArray[np.int64]
    seen: NDArray[np.bool_]
    arc: NDArray[np.float32]
    cur: NDArray[np.float32] | None
    crops: NDArray[np.uint8]

    @property
    def detection_rate(self) -> float:
        """Share of the sampled frames that have a face, 0..1."""
        return float(self.seen.mean())


class FacePack:
    """Detector and recogniser of an insightface pack (published: buffalo_l), as the protocol uses them.

    folder: the one that holds the *.onnx files. The detector works at 320 x 320 where its file leaves that
    open. It differs from `identity.faces.FaceDetector`, which follows the recipe of the generating side.
    Raises CheckpointError when the pack is missing or is no such pack, BackendError when a package or a
    provider is not there. Nothing is ever downloaded.
    """

    def __init__(self, folder: str | Path, *, providers: Sequence[str] = _CPU) -> None:
        self.folder = Path(folder)
        self._detector, self._recogniser = load_pack(
            self.folder,
            detector_size=_DETECTOR_SIZE,
            providers=providers,
            expected="the insightface pack buffalo_l (a detector such as det_10g.onnx and a recogniser such "
            "as w600k_r50.onnx)",
        )

    def read(self, image: NDArray[np.uint8]) -> MeasuredFace | None:
        """The largest face of an RGB uint8 image [H, W, 3], or None when there is none even with a border.

        The border is a quarter of the height above and below and of the width at the sides, in grey 128.
        The vector then comes from the bordered image, the crop from the image itself, as published.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"the image is {image.dtype} {list(image.shape)}; expected RGB uint8 [H, W, 3]")
        found = self._find(image)
        if found is None:
            return None
        searched, landmarks, border = found
        crop = _crop(image, landmarks - border, CROP_SIDE)
        return MeasuredFace(self._embed(searched, landmarks), crop, padded=any(border))

    def landmarks(self, image: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        """Eyes, nose tip and mouth corners [5, 2], x and y, of the face that `read` describes, or None."""
        found = self._find(image)
        return None if found is None else found[1] - found[2]

    def _find(
        self, image: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64], tuple[int, int]] | None:
        """BGR picture that was searched, landmarks in it, and its border: pixels across and down."""
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        landmarks = self._largest(bgr)
        if landmarks is not None:
            return bgr, landmarks, (0, 0)
        down, across = (int(side * _PADDING) for side in image.shape[:2])
        cv2 = import_face_package("cv2")
        padded = cv2.copyMakeBorder(bgr, down, down, across, across, cv2.BORDER_CONSTANT, value=_PADDING_GREY)
        landmarks = self._largest(padded)
        return None if landmarks is None else (padded, landmarks, (across, down))

    def _largest(self, bgr: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        boxes, landmarks = self._detector.detect(bgr)
        if not len(boxes):
            return None
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
        return np.asarray(landmarks[int(np.argmax(areas))], dtype=np.float64)

    def _embed(self, bgr: NDArray[np.uint8], landmarks: NDArray[np.float64]) -> NDArray[np.float32]:
        crop = _crop(bgr, landmarks, int(self._recogniser.input_size[0]))
        vector = np.asarray(self._recogniser.get_feat(crop), dtype=np.float32).reshape(-1)
        if not np.isfinite(vector).all():
            raise CheckpointError("the recogniser gave values that are not finite; its ONNX file is damaged")
        return vector


def face_embeddings(
    frames: NDArray[np.uint8],
    pack: FacePack,
    backbone: nn.Module | None = None,
    *,
    count: int | None = SAMPLES,
) -> SampledFaces:
    """Find the face on `count` frames (None: on every frame) and describe it with both recognisers.

    frames: RGB uint8 [F, H, W, 3]. backbone: the CurricularFace network of `load_ir_backbone`.
    """
    check_frames(frames)
    indices = np.arange(len(frames)) if count is None else face_samples(len(frames), count)
    # A short video has frames that are sampled twice; each is read once.
    read = {index: pack.read(frames[index]) for index in np.unique(indices).tolist()}
    found = [read[index] for index in indices.tolist()]
    faces = [face for face in found if face is not None]
    crops = (
        np.stack([face.crop for face in faces]) if faces else np.zeros((0, CROP_SIDE, CROP_SIDE, 3), "uint8")
    )
    return SampledFaces(
        indices=indices,
        seen=np.array([face is not None for face in found]),
        arc=np.stack([face.embedding for face in faces]) if faces else np.zeros((0, 0), np.float32),
        cur=embed_crops(backbone, crops) if backbone is not None else None,
        crops=crops,
    )


def photo_embeddings(
    photo: NDArray[np.uint8], pack: FacePack, backbone: nn.Module | None = None
) -> SampledFaces:
    """The same for one photo, RGB uint8 [H, W, 3] (K = 1). Raises PhotoError when no face is found in it."""
    found = face_embeddings(photo[None], pack, backbone, count=1)
    if not found.seen.all():
        raise PhotoError(
            "no face was found in the photo, also not with a grey border around it; nothing can be "
            "compared with it: use the photo that the video was made from"
        )
    return found


def cosine_matrix(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosines of vectors [N, D] and [M, D], float64 [N, M] in [-1, 1], for comparisons between persons."""
    one, other = (np.asarray(vectors, dtype=np.float64) for vectors in (first, second))
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)[None]
    if not (lengths > 0).all():
        raise InputError("a face vector has length 0, so it has no direction; is its recogniser damaged?")
    return np.asarray((one @ other.T) / lengths)


def face_similarity(photo: NDArray[np.float32], faces: NDArray[np.float32], *, clipped: bool = True) -> float:
    """Mean cosine of the photo's vector [1, D] with those of the frames [K, D]; 0 when K is 0.

    clipped: raise each cosine to at least 0 before the mean, as published. Without it a video of somebody
    quite unlike the person gets the mean below 0 that it has.
    """
    if not len(faces):
        return 0.0
    cosines = cosine_matrix(photo, faces)
    return float(np.maximum(cosines, 0.0).mean() if clipped else cosines.mean())


def _crop(image: NDArray[np.uint8], landmarks: NDArray[np.float64], side: int) -> NDArray[np.uint8]:
    """The face turned and scaled onto the recogniser's template, uint8 [side, side, 3], black outside."""
    warp = similarity_between(landmarks, np.asarray(RECOGNISER_TEMPLATE) * (side / _BACKBONE_SIDE))
    warped = import_face_package("cv2").warpAffine(image, warp, (side, side), borderValue=0.0)
    return np.asarray(warped, dtype=np.uint8)


def embed_crops(backbone: nn.Module, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB uint8 [K, 224, 224, 3] -> float32 [K, D] of norm 1: 112 x 112 (bilinear), then [-1, 1]."""
    import torch

    cv2 = import_face_package("cv2")
    if not len(crops):
        return np.zeros((0, 0), np.float32)
    small = np.stack([cv2.resize(crop, (_BACKBONE_SIDE, _BACKBONE_SIDE)) for crop in crops])
    tensors = itertools.chain(backbone.parameters(), backbone.buffers())
    device = next((one.device for one in tensors), torch.device("cpu"))
    batches = torch.from_numpy(small).permute(0, 3, 1, 2).split(_BACKBONE_BATCH)
    with torch.inference_mode():
        vectors = [backbone((batch.to(device).float() / 255 - 0.5) / 0.5).float().cpu() for batch in batches]
    embedded = torch.cat(vectors)
    return np.asarray((embedded / embedded.norm(dim=1, keepdim=True)).numpy(), dtype=np.float32)
