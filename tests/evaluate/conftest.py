"""Small networks in public layouts, and stand-ins for a face pack, for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_deploy.evaluate.face_similarity import FacePack

Image = NDArray[np.uint8]
# Five landmarks of a face 24 pixels wide, around the origin.
_LANDMARKS = np.array([(-6, -6), (6, -6), (0, 0), (-5, 7), (5, 7)], dtype=np.float32)


@pytest.fixture(scope="session")
def pack_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny insightface pack, random but for a detector that finds drawn faces. Not to be written to."""
    from proteus_deploy.tiny.face_pack import write_face_encoder

    folder = tmp_path_factory.mktemp("measures-pack")
    return write_face_encoder(folder, seed=0) / "models" / "antelopev2"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights in the public layout, 32 pixels a side. Not to be written to."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("measures") / "clip"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    last = len(names) - 1
    text = {"vocab_size": len(names), "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    config: Any = CLIPConfig(
        text_config=sizes | text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(5)
    model: Any = CLIPModel(config)
    # As they come the weights are so small that all images look alike.
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
        if value.ndim > 1
        else value
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


class StandInDetector:
    """Finds a 24-pixel face around each pixel that is pure red, and larger ones around pure blue (BGR input).

    Not where it is nearer than `margin` to the edge. Keeps the images it has seen.
    """

    def __init__(self, margin: int) -> None:
        self.margin = margin
        self.seen: list[Image] = []

    def detect(self, bgr: Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.seen.append(bgr.copy())
        boxes, landmarks = [], []
        for colour, size in (((0, 0, 255), 1.0), ((255, 0, 0), 1.5)):
            for y, x in np.argwhere((bgr == colour).all(axis=2)):
                if min(x, y, bgr.shape[1] - x, bgr.shape[0] - y) < self.margin:
                    continue
                half = 12 * size
                # The smaller face is the surer one, and stands first.
                boxes.append((x - half, y - half, x + half, y + half, 0.9 / size))
                landmarks.append(_LANDMARKS * size + (x, y))
        return np.array(boxes, np.float32).reshape(-1, 5), np.array(landmarks, np.float32).reshape(-1, 5, 2)


@pytest.fixture
def stand_in_pack() -> Callable[..., FacePack]:
    """stand_in_pack(margin=0) -> a pack whose detector knows red and blue dots.

    Its recogniser gives the crop's mean colour, in the blue-green-red order in which it came.
    """

    def make(margin: int = 0) -> FacePack:
        pack = FacePack.__new__(FacePack)
        pack._detector = StandInDetector(margin)
        pack._recogniser = SimpleNamespace(
            input_size=(112, 112), get_feat=lambda crop: crop.astype(np.float32).mean(axis=(0, 1))[None]
        )
        return pack

    return make


@pytest.fixture
def dotted() -> Callable[..., Image]:
    """dotted(colour, *dots, size=(100, 80)) -> an RGB image of one colour; dots: (x, y, dot colour)."""

    def make(
        colour: tuple[int, int, int],
        *dots: tuple[int, int, tuple[int, int, int]],
        size: tuple[int, int] = (100, 80),
    ) -> Image:
        image = np.full((*size, 3), colour, dtype=np.uint8)
        for x, y, dot in dots:
            image[y, x] = dot
        return image

    return make
