"""Text and identity stages that look into a cache before they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.identity.features import HIDDEN_STATES, IdentityFeatures
from proteus_deploy.runtime.backend import short_dtype
from proteus_deploy.stage_cache import StageCache, content_key
from proteus_deploy.stage_calls import Stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.identity.encoder import IdentityEncoder
    from proteus_deploy.runtime.backend import Backend

# Another release of a runtime may round otherwise.
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
_PHOTO_STAGES = ("face_parser", "image_tower")


class CachedStages:
    """Stages of one backend over a cache; without a cache they simply run.

    weights() is the hash of the weights behind the backend; it is asked for once, on the first look-up.
    A stage that was replaced in `stages` always runs: it may compute something else from the same weights.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        backend: Backend,
        cache: StageCache | None,
        weights: Callable[[], str],
    ) -> None:
        self._stages = stages
        self._backend = backend
        self._cache = cache
        self._weights = weights

    def __call__(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stage `name` gives for its named inputs."""
        stage = self._stages[name]
        if self._cache is None or not self._is_own(name):
            return stage(**inputs)
        key = content_key(name, inputs, self._facts)
        return self._cache.result(key, lambda: stage(**inputs), self._backend.device)

    def read_photo(
        self, encoder: IdentityEncoder, photo: Any, face_index: int | None
    ) -> tuple[IdentityFeatures, NDArray[np.uint8]]:
        """As `encoder.encode`, by the photo's pixels: the same picture in another file is found, too."""
        from proteus_deploy.identity.photo import open_photo

        if self._cache is None or not all(self._is_own(name) for name in _PHOTO_STAGES):
            return encoder.encode(photo, face_index=face_index)
        pixels = open_photo(photo)

        def encode() -> dict[str, Tensor]:
            features, image = encoder.encode(pixels, face_index=face_index)
            found = {f"hidden_{index}": state for index, state in enumerate(features.id_vit_hidden)}
            found |= {"id_cond": features.id_cond, "condition_image": torch.from_numpy(image)}
            return found if features.keypoints is None else {**found, "keypoints": features.keypoints}

        facts = {**self._facts, "face_index": str(face_index)}
        # A copy: the array may be read-only, which torch warns about.
        key = content_key("photo", {"pixels": torch.tensor(pixels)}, facts)
        found = self._cache.result(key, encode)
        states = tuple(found[f"hidden_{index}"] for index in range(HIDDEN_STATES))
        features = IdentityFeatures(found["id_cond"], states, found.get("keypoints"))
        return features, found["condition_image"].numpy()

    def _is_own(self, name: str) -> bool:
        stage = self._stages[name]
        return type(stage) is Stage and stage.backend is self._backend

    @cached_property
    def _facts(self) -> dict[str, str]:
        """What decides a result's bits besides a stage's inputs."""
        from proteus_deploy import __version__

        backend = self._backend
        facts = {"weights": self._weights(), "proteus_deploy": __version__, "torch": str(torch.__version__)}
        facts |= {"backend": backend.name, "dtype": short_dtype(backend.dtype), "device": str(backend.device)}
        return facts | {name: version for name in _RUNTIMES if (version := _version_of(name))}


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
