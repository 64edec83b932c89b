"""The networks behind the measures, read from one folder.

    models/buffalo_l/*.onnx       insightface pack: detector and ArcFace recogniser
    curricularface.safetensors    CurricularFace backbone (published: glint360k_curricular_face_r101_backbone)
    clip/                         CLIP in transformers' layout (published: openai/clip-vit-base-patch32)
    inception_v3.safetensors      torchvision's Inception-V3, for the face distance
    alexnet.safetensors           torchvision's AlexNet and
    lpips.safetensors             its channel weights from the lpips package, for LPIPS
    perceptual.safetensors        or, in place of the last three, one small network for both distances

Everything but the pack, which is ONNX, is safetensors; a pickle in place of one is refused with the command
that converts it. A part that isn't there is None, and the measures that need it say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import CheckpointError
from proteus_deploy.pickle_conversion import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from torch import nn

    from proteus_deploy.evaluate.clip_score import ClipEncoder
    from proteus_deploy.evaluate.face_fid import FaceFeatures
    from proteus_deploy.evaluate.face_similarity import FacePack
    from proteus_deploy.evaluate.perceptual_distance import PerceptualDistance

__all__ = ["Encoders", "load_encoders"]

_PACK = Path("models") / "buffalo_l"
_CURRICULAR = "curricularface.safetensors"
_CLIP = "clip"
_INCEPTION = "inception_v3.safetensors"
_ALEXNET, _LPIPS = "alexnet.safetensors", "lpips.safetensors"
_PERCEPTUAL = "perceptual.safetensors"


@dataclass(frozen=True, eq=False)
class Encoders:
    """What `load_encoders` found; any member may be None. missing: member -> why it is None."""

    faces: FacePack | None = None
    curricular: nn.Module | None = None
    clip: ClipEncoder | None = None
    face_features: FaceFeatures | None = None
    perceptual: PerceptualDistance | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def reason(self, part: str) -> str:
        """Why a member is None, with the way out."""
        return self.missing.get(part, f"the encoders have no part {part!r}; load_encoders reads it")

    def describe(self) -> dict[str, str]:
        """Which networks the two distances were computed with, for reports."""
        parts = {"face_fid": self.face_features, "lpips": self.perceptual}
        return {name: part.description for name, part in parts.items() if part is not None}


def load_encoders(folder: str | Path, *, device: str = "cpu") -> Encoders:
    """Load every part that `folder` has; the layout stands at the top of this module.

    device: where the torch networks run; the face pack runs on the CPU.
    Raises CheckpointError when the folder has none of the parts, when one is damaged or of another network,
    when there is a pickle in its place, when LPIPS has only one of its two files, and when the small network
    stands beside a public one that it would compete with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the one with the encoders of the measures")
    small = _file(folder, _PERCEPTUAL)
    inception, alexnet, lpips = (_file(folder, name) for name in (_INCEPTION, _ALEXNET, _LPIPS))
    rivals = [file.name for file in (inception, alexnet, lpips) if file is not None]
    if small is not None and rivals:
        raise CheckpointError(
            f"{folder} has {_PERCEPTUAL} and {', '.join(rivals)}; their values are on different scales: keep "
            "either the small network or the public ones"
        )
    if (alexnet is None) != (lpips is None):
        raise CheckpointError(
            f"{folder} has only one of {_ALEXNET} and {_LPIPS}; LPIPS needs both: copy the other one too"
        )
    missing: dict[str, str] = {}

    def absent(part: str, *names: str | Path) -> None:
        wanted = " or ".join(str(name) for name in names)
        missing[part] = f"{folder} has no {wanted}"

    parts: dict[str, Any] = {}
    if (folder / _PACK).is_dir():
        from proteus_deploy.evaluate.face_similarity import FacePack

        parts["faces"] = FacePack(folder / _PACK)
    else:
        absent("faces", _PACK)
    curricular = _file(folder, _CURRICULAR)
    if curricular is not None:
        from proteus_deploy.evaluate.ir_backbone import load_ir_backbone

        parts["curricular"] = load_ir_backbone(curricular).to(device)
    else:
        absent("curricular", _CURRICULAR)
    if (folder / _CLIP).is_dir():
        from proteus_deploy.evaluate.clip_score import ClipEncoder

        parts["clip"] = ClipEncoder(folder / _CLIP, device=device)
    else:
        absent("clip", _CLIP)
    parts |= _distances(small, inception, alexnet, lpips, device)
    if "face_features" not in parts:
        absent("face_features", _INCEPTION, _PERCEPTUAL)
    if "perceptual" not in parts:
        absent("perceptual", f"{_ALEXNET} and {_LPIPS}", _PERCEPTUAL)
    if not parts:
        raise CheckpointError(
            f"{folder} holds none of the encoders: {_PACK}, {_CURRICULAR}, {_CLIP}, {_INCEPTION}, {_ALEXNET} "
            f"with {_LPIPS}, {_PERCEPTUAL}"
        )
    return Encoders(**parts, missing=missing)


def _distances(
    small: Path | None, inception: Path | None, alexnet: Path | None, lpips: Path | None, device: str
) -> dict[str, Any]:
    """The parts `face_features` and `perceptual`, from the small network or from the public ones."""
    from proteus_deploy.evaluate.face_fid import FaceFeatures, last_map_mean

    parts: dict[str, Any] = {}
    if small is not None:
        from proteus_deploy.evaluate.perceptual_distance import PerceptualDistance
        from proteus_deploy.evaluate.perceptual_network import load_perceptual_network

        network = load_perceptual_network(small).to(device)
        parts["face_features"] = FaceFeatures(
            last_map_mean(network), description="the small perceptual network's last map", device=device
        )
        parts["perceptual"] = PerceptualDistance(
            network, description="the small perceptual network, every channel alike", device=device
        )
    if inception is not None:
        from proteus_deploy.evaluate.inception_network import load_inception_features

        parts["face_features"] = FaceFeatures(
            load_inception_features(inception).to(device), description="Inception-V3", device=device
        )
    if alexnet is not None and lpips is not None:
        from proteus_deploy.evaluate.perceptual_distance import load_lpips

        parts["perceptual"] = load_lpips(alexnet, lpips, device=device)
    return parts


def _file(folder: Path, name: str) -> Path | None:
    """`folder / name`, or None where it isn't; a pickle of the same stem is refused."""
    path = folder / name
    if not path.is_file() and not any(path.with_suffix(suffix).is_file() for suffix in PICKLE_SUFFIXES):
        return None
    from proteus_deploy.identity.encoder import weights_file

    return weights_file(folder, name)
