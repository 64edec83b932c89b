"""Find faces in a photo and describe one of them, with the insightface pack of the checkpoint.

The published code finds the face for the embedding with one detector (the largest face) and the face for the
crop with another (the face nearest the centre), so a photo of two people can mix them. Here one face is
chosen, once, and its landmarks serve the embedding, the crop and the image tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import BackendError, CheckpointError, InputError, PhotoError
from proteus_deploy.identity._packages import import_face_package
from proteus_deploy.identity.alignment import similarity_between
from proteus_deploy.onnxruntime_session import session_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "MIN_FACE_PIXELS",
    "PACK_FOLDER",
    "RECOGNISER_TEMPLATE",
    "Face",
    "FaceDetector",
    "choose_face",
    "load_pack",
]

PACK_FOLDER = Path("models") / "antelopev2"
# Below this the recogniser's 112-pixel crop is mostly invented by interpolation.
MIN_FACE_PIXELS = 32
_DETECTOR_SIZE = (640, 640)
_SCORE_THRESHOLD = 0.5
_CPU = ("CPUExecutionProvider",)
# Where eyes, nose and mouth corners lie in the recogniser's 112 x 112 input.
RECOGNISER_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
_RECOGNISER_SIDE = 112


@dataclass(frozen=True, eq=False)
class Face:
    """One detected face.

    box: x0, y0, x1, y1 in pixels of the image it was found in. score: 0..1. landmarks: float32 [5, 2], x, y
    of the eyes, nose tip and mouth corners, left ones (seen in the image) first.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: NDArray[np.float32]

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    def __str__(self) -> str:
        x0, y0, x1, y1 = (round(edge) for edge in self.box)
        return f"x {x0}..{x1}, y {y0}..{y1} ({x1 - x0} x {y1 - y0} px, score {self.score:.2f})"


def choose_face(faces: Sequence[Face], index: int | None = None) -> Face:
    """The one face to use: `index` counts from left to right, from 0; without it, the largest box.

    Raises PhotoError when there is no face, no face of that index (the faces are listed with their boxes),
    or the face is smaller than MIN_FACE_PIXELS on a side.
    """
    if not faces:
        raise PhotoError(
            "no face was found in the photo; use one with a face seen from the front, well lit, "
            "uncovered, and at least a tenth of the photo's width"
        )
    ordered = sorted(faces, key=lambda face: face.box)
    if index is None:
        face = max(ordered, key=lambda face: face.width * face.height)
    elif 0 <= index < len(ordered):
        face = ordered[index]
    else:
        listing = "; ".join(f"{position}: {face}" for position, face in enumerate(ordered))
        raise PhotoError(
            f"there is no face {index}: the photo has {len(ordered)}, counted from the left from 0: {listing}"
        )
    if min(face.width, face.height) < MIN_FACE_PIXELS:
        raise PhotoError(
            f"the face at {face} is smaller than {MIN_FACE_PIXELS} px on a side; "
            "use a closer photo or crop it around the face"
        )
    return face


def load_pack(
    folder: Path, *, detector_size: tuple[int, int], providers: Sequence[str], expected: str
) -> tuple[Any, Any]:
    """insightface's detector and recogniser out of the *.onnx files in `folder`.

    detector_size: of the detector's input where its file leaves that open. expected: what should be there,
    for the messages. Raises as `FaceDetector` does. Nothing is ever downloaded.
    """
    # insightface downloads a pack it can't find, so the folder is looked at first.
    if not folder.is_dir() or not any(folder.glob("*.onnx")):
        raise CheckpointError(f"{folder} holds no *.onnx files; expected {expected}. Copy it there")
    _check_providers(providers)
    analysis = import_face_package("insightface.app")
    try:
        models = analysis.FaceAnalysis(
            name=str(folder.resolve()),
            allowed_modules=["detection", "recognition"],
            providers=list(providers),
            sess_options=session_options(),
        )
    except Exception as error:  # onnxruntime and the pack reader raise types of their own
        raise CheckpointError(
            f"{folder} can't be loaded as a face pack ({type(error).__name__}: {error}); "
            f"copy {expected} again"
        ) from error
    # 0 keeps the providers asked for; a negative number would replace them.
    models.prepare(ctx_id=0, det_thresh=_SCORE_THRESHOLD, det_size=detector_size)
    detector, recogniser = models.models.get("detection"), models.models.get("recognition")
    if recogniser is None or not getattr(detector, "use_kps", False):
        raise CheckpointError(
            f"{folder} has no recogniser, or its detector gives no landmarks (found: "
            f"{', '.join(sorted(file.name for file in folder.glob('*.onnx')))}); both are needed: "
            "a detector with 9 outputs and a recogniser with a square input and one output"
        )
    return detector, recogniser


class FaceDetector:
    """The detector and the recogniser in `face_encoder/models/antelopev2/*.onnx`.

    face_encoder: the checkpoint's folder of that name. providers: onnxruntime execution providers, in order;
    the CPU by default. Nothing is ever downloaded. Can be used from several threads.

    Raises CheckpointError when the pack is missing or is no such pack, BackendError when a package or a
    provider is not there.
    """

    def __init__(self, face_encoder: str | Path, *, providers: Sequence[str] = _CPU) -> None:
        folder = Path(face_encoder) / PACK_FOLDER
        self._detector, self._recogniser = load_pack(
            folder,
            detector_size=_DETECTOR_SIZE,
            providers=providers,
            expected="the antelopev2 pack of the checkpoint (a detector such as scrfd_10g_bnkps.onnx and a "
            "recogniser such as glintr100.onnx)",
        )
        self._side = int(self._recogniser.input_size[0])
        if self._side % _RECOGNISER_SIDE:
            raise CheckpointError(
                f"the recogniser in {folder} takes {self._side} x {self._side} crops; "
                f"only multiples of {_RECOGNISER_SIDE} have a known template"
            )

    def detect(self, image: NDArray[np.uint8]) -> list[Face]:
        """All faces in an RGB uint8 image [H, W, 3], from left to right; an empty list when there is none.

        One pass, at the published 640 x 640: when it finds nothing, nothing else is tried.
        """
        import numpy as np

        boxes, landmarks = self._detector.detect(_bgr(image))
        faces = [
            Face(
                box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                score=float(box[4]),
                landmarks=np.array(points, dtype=np.float32),
            )
            for box, points in zip(boxes, landmarks, strict=True)
        ]
        return sorted(faces, key=lambda face: face.box)

    def choose(self, faces: Sequence[Face], index: int | None = None) -> Face:
        """See `choose_face`."""
        return choose_face(faces, index)

    def embed(self, image: NDArray[np.uint8], face: Face) -> NDArray[np.float32]:
        """The recogniser's vector of `face`, float32 [512], as it comes: not normalised (norm about 20).

        image: the RGB uint8 image [H, W, 3] that `face` was found in.
        """
        import numpy as np

        cv2 = import_face_package("cv2")
        template = np.asarray(RECOGNISER_TEMPLATE) * (self._side / _RECOGNISER_SIDE)
        warp = similarity_between(face.landmarks, template)
        crop = cv2.warpAffine(_bgr(image), warp, (self._side, self._side), borderValue=0.0)
        vector = np.asarray(self._recogniser.get_feat(crop), dtype=np.float32).reshape(-1)
        if not np.isfinite(vector).all():
            raise CheckpointError("the recogniser gave values that are not finite; its ONNX file is damaged")
        return vector


def _bgr(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import numpy as np

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"the image is {image.dtype} {list(image.shape)}; "
            "expected RGB uint8 [H, W, 3], as open_photo gives"
        )
    return np.ascontiguousarray(image[:, :, ::-1])


def _check_providers(providers: Sequence[str]) -> None:
    """onnxruntime replaces a provider it lacks by the CPU with a mere warning; here that is an error."""
    available = import_face_package("onnxruntime").get_available_providers()
    absent = [name for name in providers if name not in available]
    if absent or not providers:
        raise BackendError(
            f"onnxruntime has no provider {', '.join(absent) or '(none was named)'}; "
            f"available here: {', '.join(available)}"
        )
