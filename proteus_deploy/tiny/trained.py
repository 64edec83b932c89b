"""The trained tiny model, as the package ships it, and the networks that measure its videos.

It knows drawn people, as `proteus_deploy.training.avatars` draws them, and prompts in the words of
docs/avatars.md. docs/tiny-model.md says how it was made and what it can do.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from proteus_deploy._files import atomic_directory

__all__ = ["ENCODERS", "GUIDANCE_SCALE", "MODEL", "NUM_INFERENCE_STEPS", "PORTRAIT", "copy_folder"]

# A checkpoint in the published layout, float16 safetensors.
MODEL = Path(__file__).parent / "model"
# What `evaluate --encoders` reads: recognisers that the model itself doesn't have, CLIP, perceptual network.
ENCODERS = Path(__file__).parent / "encoders"
# A portrait checkpoint that draws such people from text, for those who have no photo.
PORTRAIT = Path(__file__).parent / "portrait_model"

# What its figures were measured with.
NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 1.25


def copy_folder(source: Path, folder: Path) -> Path:
    """Copy `MODEL`, `ENCODERS` or `PORTRAIT` to `folder`, which is whole or absent afterwards; return it.

    Raises InputError where `folder` exists.
    """
    with atomic_directory(folder) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)
    return folder
