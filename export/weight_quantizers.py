"""Float32 weights -> low-bit codes and scales, and back. Pure, exact and symmetric: zero is always code 0.

    scale = largest |w| of its values / largest code        then rounded to the dtype that it is stored in
    code  = w / scale, rounded to the nearest code (ties to even), held inside the format's range
    w'    = code * scale

NVFP4 has two levels: one scale g for the tensor, and an E4M3 scale for each block of 16.

    g = largest |w| / (6 * 448)
    scale = (largest |w| of the block / 6) / g rounded to E4M3,  w' = code * scale * g

Axes: N outputs, K inputs of a linear layer, B values of a block along K. Sources: ONNX DequantizeLinear-23;
E4M3 (arXiv 2209.05433); E2M1 with block scales (OCP Microscaling formats v1.0, NVIDIA's NVFP4).
Codes of int8 leave out -128, so that the range is the same on both sides, as TensorRT asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from proteus_deploy.errors import InputError

LARGEST_CODE = {"int8": 127.0, "fp8_e4m3": 448.0, "int4": 7.0, "nvfp4": 6.0}
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours
_SMALLEST_E4M3 = 2.0**-9

Format = Literal["int8", "fp8_e4m3", "int4", "nvfp4"]
Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """Codes [N, K]: int8 (of int8 and int4), float8_e4m3fn, or uint8 bit patterns of E2M1 (nvfp4).

    scale: [] for a tensor, [N] for channels, [N, K / B] for blocks; E4M3 for nvfp4, else the dtype asked for.
    global_scale: [] of nvfp4, in the dtype asked for; None for the others.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None = None

    def dequantise(self) -> Tensor:
        """Float32 [N, K]: what a runtime computes with, were it to compute in float32."""
        if self.format == "nvfp4":
            return dequantise_nvfp4(self)
        scale, codes = self.scale.float(), self.codes.float()
        if scale.ndim == 1:
            scale = scale[:, None]
        elif scale.ndim == 2:
            scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        return codes * scale


def quantise_weight(
    weight: Tensor,
    kind: Format,
    granularity: Granularity,
    block_size: int | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "the weight",
) -> QuantisedWeight:
    """Quantise float32 [N, K] by format. scale_dtype: float32, float16 or bfloat16, as scales are stored.

    Raises InputError, with `name`, for NaN, infinity, an empty weight, or K that the block doesn't divide.
    """
    if kind == "int8":
        return quantise_int8(weight, granularity, scale_dtype=scale_dtype, name=name)
    if kind == "fp8_e4m3":
        return quantise_fp8(weight, granularity, scale_dtype=scale_dtype, name=name)
    if block_size is None:
        raise InputError(f"{name}: {kind} needs the size of its blocks, for instance 32")
    if kind == "int4":
        return quantise_int4(weight, block_size, scale_dtype=scale_dtype, name=name)
    return quantise_nvfp4(weight, block_size, scale_dtype=scale_dtype, name=name)


def quantise_int8(
    weight: Tensor,
    granularity: Granularity,
    *,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "the weight",
) -> QuantisedWeight:
    """Float32 [N, K] -> int8 codes from -127 to 127. Raises InputError as `quantise_weight`."""
    scale = _scale(_largest(_checked(weight, name), granularity, name), "int8", scale_dtype)
    codes = (weight / _columns(scale)).round_().clamp_(-127, 127).to(torch.int8)
    return QuantisedWeight("int8", codes, scale)


def quantise_fp8(
    weight: Tensor,
    granularity: Granularity,
    *,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "the weight",
) -> QuantisedWeight:
    """Float32 [N, K] -> E4M3 codes up to 448. Raises InputError as `quantise_weight`."""
    scale = _scale(_largest(_checked(weight, name), granularity, name), "fp8_e4m3", scale_dtype)
    # Above 464 the conversion gives NaN, which a scale that was rounded down could reach.
    codes = (weight / _columns(scale)).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return QuantisedWeight("fp8_e4m3", codes, scale)


def quantise_int4(
    weight: Tensor, block_size: int, *, scale_dtype: torch.dtype = torch.float32, name: str = "the weight"
) -> QuantisedWeight:
    """Float32 [N, K] -> codes from -7 to 7 in int8, a scale for each block. Raises as `quantise_weight`."""
    blocks = _blocks(_checked(weight, name), block_size, name)
    scale = _scale(blocks.abs().amax(-1), "int4", scale_dtype)
    codes = (blocks / scale.float()[..., None]).round_().clamp_(-7, 7).to(torch.int8)
    return QuantisedWeight("int4", codes.flatten(1), scale)


def quantise_nvfp4(
    weight: Tensor, block_size: int, *, scale_dtype: torch.dtype = torch.float32, name: str = "the weight"
) -> QuantisedWeight:
    """Float32 [N, K] -> E2M1 bit patterns (uint8), E4M3 scales [N, K / B] and a global scale [].

    Raises InputError as `quantise_weight`.
    """
    blocks = _blocks(_checked(weight, name), block_size, name)
    largest = blocks.abs().amax(-1)
    top = largest.max() / (LARGEST_CODE["nvfp4"] * LARGEST_CODE["fp8_e4m3"])
    common = stored_scale(top, scale_dtype)
    scale = (largest / LARGEST_CODE["nvfp4"] / common.float()).clamp_(max=LARGEST_CODE["fp8_e4m3"])
    # A block that is tiny beside the largest gets the smallest scale and not zero; one of zeros gets 1.
    scale = torch.where(largest > 0, scale.clamp(min=_SMALLEST_E4M3), 1.0).to(torch.float8_e4m3fn)
    codes = encode_e2m1(blocks / (scale.float() * common.float())[..., None])
    return QuantisedWeight("nvfp4", codes.flatten(1), scale, common)


def dequantise_nvfp4(weight: QuantisedWeight) -> Tensor:
    """Float32 [N, K] of E2M1 codes, E4M3 scales and the global scale."""
    assert weight.global_scale is not None
    step = weight.scale.float() * weight.global_scale.float()
    values = decode_e2m1(weight.codes)
    return values * step.repeat_interleave(values.shape[1] // step.shape[1], dim=1)


def encode_e2m1(values: Tensor) -> Tensor:
    """Float32 of any shape -> uint8: sign in bit 3, then the index into E2M1_VALUES; above 6 is 6.

    Ties go to the neighbour whose last bit is 0, as IEEE rounding does.
    """
    magnitude = values.abs().contiguous()
    middles = torch.tensor(_E2M1_MIDDLES, device=values.device)
    below = torch.bucketize(magnitude, middles, right=False)  # a tie stays below
    above = torch.bucketize(magnitude, middles, right=True)
    index = torch.where(below % 2 == 0, below, above)
    return (index | (values < 0).to(index.dtype) << 3).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """uint8 bit patterns -> float32."""
    table = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), device=codes.device)
    return table[codes.long()]


def _checked(weight: Tensor, name: str) -> Tensor:
    if weight.ndim != 2 or weight.dtype != torch.float32 or not weight.numel():
        raise InputError(
            f"{name} is {weight.dtype} {list(weight.shape)}; quantisation takes float32 [outputs, inputs]"
        )
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{name} holds NaN or infinity, which no code stands for; mend the checkpoint")
    return weight


def _largest(weight: Tensor, granularity: Granularity, name: str) -> Tensor:
    if granularity == "block":
        raise InputError(f"{name}: int8 and fp8_e4m3 have a scale for a tensor or a channel, not a block")
    return weight.abs().amax() if granularity == "tensor" else weight.abs().amax(1)


def _blocks(weight: Tensor, size: int, name: str) -> Tensor:
    """[N, K] -> [N, K / B, B]. Nothing is padded: a runtime would have to know of it."""
    if size < 1 or weight.shape[1] % size:
        raise InputError(
            f"{name} has {weight.shape[1]} inputs, which blocks of {size} do not divide; choose a block size "
            "that does, or another format for this layer"
        )
    blocks: Tensor = weight.unflatten(1, (-1, size))
    return blocks


def _scale(largest: Tensor, kind: Format, dtype: torch.dtype) -> Tensor:
    return stored_scale(largest / LARGEST_CODE[kind], dtype)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`; 1 where all values are zero, and never 0 where one is not."""
    # Below 2^-20, float16 has fewer than five bits left for a scale.
    smallest = 2.0**-20 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    return torch.where(scale > 0, scale.clamp(min=smallest), 1.0).to(dtype)


def _columns(scale: Tensor) -> Tensor:
    return scale.float()[:, None] if scale.ndim else scale.float()
