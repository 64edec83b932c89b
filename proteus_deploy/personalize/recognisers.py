"""The networks of the identity reward, from where a model and the encoders keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proteus_deploy._files import sha256_of
from proteus_deploy.errors import InputError
from proteus_deploy.personalize.face_reward import FaceReward
from proteus_deploy.personalize.onnx_recogniser import OnnxRecogniser

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.evaluate.face_similarity import FacePack
    from proteus_deploy.personalize.model import PersonalModel
    from proteus_deploy.personalize.settings import PersonalizeSettings

__all__ = ["face_reward"]

_PACK, _GLINT = "models/antelopev2", "glintr*.onnx"


def face_reward(
    model: PersonalModel, encoders: Encoders, photo: NDArray[np.uint8], settings: PersonalizeSettings
) -> FaceReward:
    """Raises InputError naming what is missing, CheckpointError for a damaged file, PhotoError."""
    if encoders.faces is None:
        raise InputError(f"faces are looked for with a detector: {encoders.reason('faces')}")
    recognisers: dict[str, nn.Module] = {}
    for name in settings.recogniser_names:
        if name == "glint":
            recognisers[name] = _glint(model, encoders.faces).to(model.backend.device)
        elif encoders.curricular is None:
            raise InputError(f"recognisers is {settings.recognisers!r}: {encoders.reason('curricular')}")
        else:
            recognisers[name] = encoders.curricular.to(model.backend.device)
    return FaceReward(encoders.faces, recognisers, photo, faces=settings.faces, views=settings.views)


def _glint(model: PersonalModel, pack: FacePack) -> OnnxRecogniser:
    folder = None if model.face_encoder is None else model.face_encoder / _PACK
    files = [] if folder is None else sorted(folder.glob(_GLINT))
    if not files:
        raise InputError(
            f"{folder or 'the model'} has no {_GLINT}, which the reward of recogniser glint needs; copy the "
            "face_encoder folder of the checkpoint, or reward with --recognisers "
            "curricular"
        )
    same = [file for file in sorted(pack.folder.glob("*.onnx")) if sha256_of(file) == sha256_of(files[0])]
    if same:
        raise InputError(
            f"{files[0]} and {same[0]} are the same network, and what is rewarded can't be what measures "
            "(face_sim_arc); put the pack buffalo_l into the encoders, or reward with --recognisers "
            "curricular"
        )
    return OnnxRecogniser(files[0])
