"""Write a complete, tiny `face_encoder` folder in the published layout, from a seed.

The real loaders read it: insightface takes the two ONNX files for an SCRFD detector and an ArcFace
recogniser, and `proteus_deploy.identity` reads the parser and the tower. The recogniser, the parser and the
tower have random weights; the detector is computed by hand (see `tiny/face_detector.py`) and really finds
drawn faces.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file, write_json
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["write_face_encoder"]

# Five states need five blocks; a tower of six shows that a state is not always the last block's.
_LEAST_DEPTH = 5
_RECOGNISER_SIDE = 112
# The published recogniser gives vectors of about this norm, and the encoder must not normalise them away.
_EMBEDDING_NORM = 20.0
# Mean square of what reaches the last layer, over drawn portraits.
_ACTIVATION = 0.08
_SKIN_LABEL = 1


def write_face_encoder(
    folder: str | Path,
    *,
    seed: int,
    face_dim: int = 32,
    pooled_dim: int = 32,
    tower_width: int = 32,
    tower_depth: int = 6,
    tower_heads: int = 2,
    tower_grid: int = 4,
    tower_patch: int = 14,
) -> Path:
    """Write the folder and return it; the same arguments give the same bytes.

    face_dim: length of the recogniser's vector. pooled_dim: length of the tower's. The tower takes an image
    of tower_grid * tower_patch pixels a side and gives states [1, tower_grid**2 + 1, tower_width].
    Raises InputError when the sizes do not fit together. Needs the packages onnx and torch.
    """
    if tower_depth < _LEAST_DEPTH:
        raise InputError(
            f"tower_depth is {tower_depth}; five hidden states need at least {_LEAST_DEPTH} blocks"
        )
    if tower_heads < 1 or tower_width % tower_heads or (tower_width // tower_heads) % 4:
        raise InputError(
            f"tower_width {tower_width} can't be cut into {tower_heads} heads of a multiple of 4 channels"
        )
    for name, value in (("face_dim", face_dim), ("pooled_dim", pooled_dim), ("tower_grid", tower_grid)):
        if value < 1:
            raise InputError(f"{name} is {value}; choose at least 1")

    from proteus_deploy.identity.encoder import PARSER_NAME, TOWER_NAME
    from proteus_deploy.identity.faces import PACK_FOLDER
    from proteus_deploy.identity.image_tower import CONFIG_NAME, ImageTowerSizes
    from proteus_deploy.tiny.face_detector import detector_model

    folder = Path(folder)
    last = tower_depth - 1
    hidden_layers = tuple(last - 4 + state for state in range(5)) if last >= _LEAST_DEPTH else (1, 2, 3, 4, 5)
    sizes = ImageTowerSizes(
        width=tower_width,
        depth=tower_depth,
        head_width=tower_width // tower_heads,
        mlp_width=2 * tower_width,
        patch=tower_patch,
        grid=tower_grid,
        pooled=pooled_dim,
        hidden_layers=hidden_layers,
    )
    _write_model(folder / PACK_FOLDER / "scrfd_tiny.onnx", detector_model())
    _write_model(folder / PACK_FOLDER / "glintr_tiny.onnx", _recogniser_model(seed, face_dim))
    _write_tensors(folder / PARSER_NAME, _parser_weights(seed + 1))
    _write_tensors(folder / TOWER_NAME, _tower_weights(seed + 2, sizes))
    write_json(folder / CONFIG_NAME, {"hidden_layers": list(hidden_layers)})
    return folder


def _recogniser_model(seed: int, face_dim: int) -> Any:
    """A blur, two convolutions and a linear layer, [batch, 3, 112, 112] -> [batch, face_dim]."""
    import numpy as np
    from onnx import helper

    from proteus_deploy.tiny.face_detector import constant, model_proto, tensor_info

    generator = np.random.default_rng(seed)

    def random_weight(name: str, *shape: int) -> Any:
        fan_in = int(np.prod(shape[1:]))
        return constant(name, generator.standard_normal(shape) * (2.0 / fan_in) ** 0.5)

    # The map ends with 7 x 7 places of 8 channels; their mean would forget where eyes and mouth are.
    flat = 8 * 7 * 7
    linear = generator.standard_normal((face_dim, flat))
    linear -= linear.mean(axis=1, keepdims=True)
    weights = [
        random_weight("first", 8, 3, 3, 3),
        random_weight("second", 8, 8, 3, 3),
        constant("linear", linear * (_EMBEDDING_NORM / (_ACTIVATION * face_dim * flat) ** 0.5)),
    ]
    nodes = [
        # Blurred first, so that a landmark off by a pixel or two does not change the person.
        helper.make_node(
            "AveragePool", ["face"], ["blurred"], kernel_shape=[24, 24], strides=[8, 8], pads=[8, 8, 8, 8]
        ),
        helper.make_node("Conv", ["blurred", "first"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["a"], ["b"], alpha=0.2),
        helper.make_node("Conv", ["b", "second"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["c"], ["d"], alpha=0.2),
        helper.make_node("Flatten", ["d"], ["e"], axis=1),
        helper.make_node("Gemm", ["e", "linear"], ["embedding"], transB=1),
    ]
    side = _RECOGNISER_SIDE
    inputs = [tensor_info("face", ["batch", 3, side, side])]
    return model_proto(
        "tiny_recogniser", nodes, inputs, [tensor_info("embedding", ["batch", face_dim])], weights
    )


def _parser_weights(seed: int) -> dict[str, torch.Tensor]:
    """BiSeNet with a sixteenth of the channels, random but for a lean towards the label "skin".

    With random weights alone the label, and so the white mask, would be noise over the whole face, and the
    tower would see hardly anything of it. The head has no bias, so the lean is put on its inputs: they come
    from a ReLU and are never negative, and the skin label weighs all of them positively.
    """
    import torch

    from proteus_deploy.identity.face_parser import BiSeNet, BiSeNetSizes

    sizes = BiSeNetSizes(stages=(4, 8, 16, 32), context=8, fusion=16, gate=4, head=16)
    with torch.device("meta"):
        shapes = {
            key: (tuple(value.shape), value.dtype) for key, value in BiSeNet(sizes).state_dict().items()
        }
    tensors = _random_tensors(shapes, seed)
    head = tensors["conv_out.conv_out.weight"]
    head[_SKIN_LABEL] = head.abs().amax(dim=0) * 0.5
    return tensors


def _tower_weights(seed: int, sizes: Any) -> dict[str, torch.Tensor]:
    """The tower under its public names, `visual.…`, with the rotation tables that the public file has."""
    import torch

    from proteus_deploy.identity.image_tower import ImageTower, rope_tables

    with torch.device("meta"):
        tower = ImageTower(sizes)
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in tower.state_dict().items()}
    tensors = {f"visual.{key}": value for key, value in _random_tensors(shapes, seed).items()}
    cosines, sines = rope_tables(sizes.grid, sizes.head_width)
    return tensors | {"visual.rope.freqs_cos": cosines, "visual.rope.freqs_sin": sines}


def _random_tensors(
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], seed: int
) -> dict[str, torch.Tensor]:
    """Weights by fan-in, scales near 1, offsets near 0, running variances positive."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for key, (shape, dtype) in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        if not dtype.is_floating_point:
            tensors[key] = torch.zeros(shape, dtype=dtype)
        elif key.endswith(("pos_embed", "cls_token")):
            tensors[key] = 0.5 * noise
        elif key.endswith("running_var"):
            tensors[key] = 1.0 + 0.1 * noise.abs()
        elif len(shape) > 1:
            tensors[key] = noise * (1.0 / noise[0].numel()) ** 0.5
        else:
            tensors[key] = (1.0 if key.endswith("weight") else 0.0) + 0.1 * noise
    return tensors


def _write_model(path: Path, model: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
