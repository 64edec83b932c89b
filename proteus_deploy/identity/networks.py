"""The two face networks that are torch modules, as graphs of the stage table.

Detector and recogniser are ONNX files already and are copied into a bundle as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError
from proteus_deploy.identity.alignment import CROP_SIZE
from proteus_deploy.identity.encoder import PARSER_NAME, TOWER_NAME, weights_file
from proteus_deploy.identity.face_parser import LABELS, load_face_parser
from proteus_deploy.identity.features import HIDDEN_STATES
from proteus_deploy.identity.image_tower import ImageTowerSizes, load_image_tower, read_image_tower_sizes
from proteus_deploy.model.networks import Network
from proteus_deploy.stages import Graph, TensorSpec

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint


class _OutputsInOrder(nn.Module):
    """Gives a network's named outputs as a tuple in the order of its graph."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, face: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(face)
        return tuple(outputs[name] for name in self.names)


class _LoadedWeights:
    def __init__(self, source: str, tensors: Mapping[str, Tensor]) -> None:
        self.source = source
        self._tensors = tensors

    def keys(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def face_graphs(checkpoint: Checkpoint) -> list[Graph]:
    """Graphs `face_parser` and `image_tower`. Raises CheckpointError when a weight file is missing."""
    sizes = _tower_sizes(_folder(checkpoint))
    tokens, states = sizes.grid**2 + 1, range(HIDDEN_STATES)
    crop = (1, 3, CROP_SIZE, CROP_SIZE)
    return [
        Graph(
            "face_parser",
            "face_parser",
            (TensorSpec("face", crop),),
            (TensorSpec("logits", (1, LABELS, CROP_SIZE, CROP_SIZE)),),
        ),
        Graph(
            "image_tower",
            "image_tower",
            (TensorSpec("face", (1, 3, sizes.image_size, sizes.image_size)),),
            (
                TensorSpec("pooled", (1, sizes.pooled)),
                *(TensorSpec(f"hidden_{index}", (1, tokens, sizes.width)) for index in states),
            ),
        ),
    ]


def image_tokens(checkpoint: Checkpoint) -> int:
    """Tokens of the image tower's hidden states: patches and the class token (577)."""
    return int(_tower_sizes(_folder(checkpoint)).grid ** 2 + 1)


def face_network(checkpoint: Checkpoint, graph: str) -> Network:
    """The network of graph `face_parser` or `image_tower`."""
    folder = _folder(checkpoint)
    names: tuple[str, ...]
    network: nn.Module
    if graph == "face_parser":
        file, names = weights_file(folder, PARSER_NAME), ("logits",)
        network = load_face_parser(file)
    elif graph == "image_tower":
        file = weights_file(folder, TOWER_NAME)
        names = ("pooled", *(f"hidden_{index}" for index in range(HIDDEN_STATES)))
        network = load_image_tower(file)
    else:
        raise CheckpointError(f"no network {graph!r}; the face networks are face_parser and image_tower")
    module = _OutputsInOrder(network, names)
    source = _LoadedWeights(str(file), dict(module.state_dict()))
    return Network(module, "face_encoder", str, source)


def _folder(checkpoint: Checkpoint) -> Path:
    if checkpoint.face_encoder is None:
        raise CheckpointError(f"{checkpoint.folder} has no face_encoder folder, so it can't read photos")
    return checkpoint.face_encoder


def _tower_sizes(folder: Path) -> ImageTowerSizes:
    return read_image_tower_sizes(weights_file(folder, TOWER_NAME))
