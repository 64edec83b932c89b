"""Random weights for the tiny checkpoint, by key: every layer non-zero, signals of about unit size.

Layers that training starts from zero get numbers like all others, so that a wrong wiring shows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy._files import atomic_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["text_encoder_weights", "transformer_weights", "vae_weights", "write_weights"]

Shapes = Mapping[str, tuple[int, ...]]


def transformer_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Weights of the transformer under its published keys, float32."""
    weights = {}
    for key, shape in shapes.items():
        gain = 1.0
        if key.startswith("transformer_blocks") and ".linear." in key:
            gain = 0.5  # modulation: scales and gates stay around one half, so no block drowns the others
        weights[key] = _plain(key, shape, seed) * gain
    return weights


def text_encoder_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Weights of a T5 encoder, float32. T5 doesn't divide its attention by √D, so its queries are small."""
    weights = {}
    for key, shape in shapes.items():
        value = _plain(key, shape, seed)
        if key == "shared.weight":
            value *= math.sqrt(shape[1])  # unit embeddings
        elif key.endswith("SelfAttention.q.weight"):
            value *= 0.5
        elif key.endswith("relative_attention_bias.weight"):
            value *= 0.5 * math.sqrt(shape[1])
        weights[key] = value
    return weights


def vae_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Weights of AutoencoderKLCogVideoX, float32, whose convolutions blur more than they scatter.

    An untrained decoder of independent numbers shows salt and pepper; this one shows clouds of colour that
    follow the latents. Part of each kernel is unstructured, as a symmetric one would hide a flipped axis.
    """
    weights = {}
    for key, shape in shapes.items():
        value = _plain(key, shape, seed)
        if len(shape) > 2 and shape[-1] == 3:
            value = 0.2 * value + _blur(key, shape, seed)
        if ".conv_y." in key or ".conv_b." in key:
            # Modulation by the latents at their own coarse grid: strong, it would show as tiles.
            value *= 0.05
            if key.endswith("conv_y.conv.bias"):
                value += 1.0
        weights[key] = value
    # What all channels have in common is brightness far from grey; without it the colours fill the range.
    mixing = weights["decoder.conv_out.conv.weight"]
    mixing -= mixing.mean(dim=1, keepdim=True)
    _narrow_posterior(weights)
    return weights


def write_weights(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """One safetensors file; the same weights give the same bytes."""
    from safetensors.torch import save_file

    stored = {key: weights[key].to(dtype).contiguous() for key in sorted(weights)}
    with atomic_file(path) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    import torch

    # A generator of its own for each key: another key more or less changes no other weight.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.randn(shape, generator=generator)


def _plain(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Matrices by fan-in, scales of norms near 1, biases near 0."""
    noise = _normal(key, shape, seed)
    if len(shape) > 1:
        fan_in = noise[0].numel() if noise.shape[0] > 1 else shape[-1]
        return noise / math.sqrt(fan_in)
    return 0.1 * noise + (1.0 if key.endswith("weight") else 0.0)


def _blur(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A random mixture of channels times a binomial kernel over the other axes (time, height, width)."""
    import torch

    axis = torch.tensor([0.25, 0.5, 0.25])
    kernel = axis[:, None] * axis
    if len(shape) == 5:
        kernel = axis[:, None, None] * kernel
    mixture = _normal(f"{key}/mixture", shape[:2], seed) / math.sqrt(shape[1])
    return mixture.reshape(*shape[:2], *(1 for _ in shape[2:])) * kernel


def _narrow_posterior(weights: dict[str, Tensor]) -> None:
    """The second half of the encoder's channels is a log variance: about -4, as in a trained encoder."""
    half = weights["encoder.conv_out.conv.bias"].shape[0] // 2
    weights["encoder.conv_out.conv.weight"][half:] *= 0.3
    weights["encoder.conv_out.conv.bias"][half:] -= 4.0
