"""From a photo to identity features, by the published Proteus-ID recipe.

    photo.py         any image source -> RGB array, safely
    faces.py         detector and recogniser; one face is chosen, once
    alignment.py     the 512 x 512 aligned crop, and points carried through the same warp
    face_parser.py   BiSeNet: which pixels are face
    image_tower.py   EVA02-CLIP-L-14-336: pooled vector and five hidden states
    encoder.py       all of it together: photo -> IdentityFeatures and the condition image

Importing this package loads neither torch nor any face package; `IdentityEncoder` is imported from
`proteus_deploy.identity.encoder`.
"""

from __future__ import annotations

from proteus_deploy.identity.features import IdentityFeatures

__all__ = ["IdentityFeatures"]
