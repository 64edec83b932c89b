"""Linear layers that hold a quantised weight, and attention with 8-bit operands, in PyTorch.

    y = (codes of x · m / f) (codes of W / m)ᵀ · scales · f + b

computes what the nodes of `qdq.py` say. Real products multiply the codes themselves: int8 with int32 sums
(`torch._int_mm`), E4M3 with float32 sums (`torch._scaled_mm`). Simulated ones multiply the numbers that the
codes stand for, in the layer's precision: the same up to rounding, on any device.

Axes: M rows, K inputs, N outputs, B batch, G groups of timesteps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proteus_deploy.errors import BackendError
from proteus_deploy.export.weight_quantizers import LARGEST_CODE, decode_e2m1, stored_scale

if TYPE_CHECKING:
    from proteus_deploy.export.input_scaling import InputScaling
    from proteus_deploy.export.weight_quantizers import QuantisedWeight

__all__ = [
    "FoldedLinear",
    "Fp8Linear",
    "Int8Linear",
    "QuantizedLinear",
    "SimulatedAttention",
    "SimulatedLinear",
    "TimestepGroups",
    "WeightOnlyLinear",
]

_FP8 = torch.float8_e4m3fn
# cuBLAS takes no int8 product of 16 rows or fewer, and rows of other lengths than these.
_CUDA_ROWS, _CUDA_MULTIPLE = 17, {"int8": 8, "fp8_e4m3": 16}


class TimestepGroups(nn.Module):
    """Stands before the denoiser's table of timesteps and remembers the group of each video of this run.

    table: int64 [1000], the group of each timestep. `current`, int64 [B], holds from the table's look-up on.
    """

    def __init__(self, inner: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)
        self.current = table[:1]

    def forward(self, timestep: Tensor) -> Tensor:
        self.current = self.table[timestep]
        return self.inner(timestep)  # type: ignore[no-any-return]


class QuantizedLinear(nn.Module):
    """What all forms share: a weight in codes, the scaling of the input, a bias. It computes in `dtype`.

    Nothing of it but the bias is in the state dict: codes are made from the checkpoint's weights.
    """

    # transformers' T5 asks for the dtype of a weight before it calls the layer; here the layer casts.
    weight: None = None

    def __init__(
        self,
        weight: QuantisedWeight,
        scaling: InputScaling,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
        groups: TimestepGroups | None = None,
    ) -> None:
        """weight: of W / m, float32 scales or of `dtype`. groups: needed where the scaling has factors."""
        super().__init__()
        self.format, self.dtype = weight.format, dtype
        self.out_features, self.in_features = weight.codes.shape
        four_bits = self.format in ("int4", "nvfp4")
        self.codes = self._keep("codes", (_packed(weight.codes) if four_bits else weight.codes).to(device))
        self.scale = self._keep("scale", weight.scale.to(device))
        self.global_scale = self._keep(
            "global_scale", None if weight.global_scale is None else weight.global_scale.to(device)
        )
        multiplier, factors = scaling.multiplier, scaling.factors
        self.multiplier = self._keep(
            "multiplier", None if multiplier is None else multiplier.to(device, dtype)
        )
        stored = None if factors is None else factors.to(device, dtype)
        self.factors = self._keep("factors", stored)
        self.shrinks = self._keep("shrinks", None if stored is None else (1 / stored.float()).to(dtype))
        assert (factors is None) == (groups is None)
        self._groups = (groups,)  # in a tuple: it is a part of the denoiser, not of every layer
        self.bias = bias
        step = None
        if scaling.amax is not None:
            kind = "int8" if self.format == "int8" else "fp8_e4m3"
            step = stored_scale(torch.tensor(scaling.amax / LARGEST_CODE[kind]), dtype).float().to(device)
        self.step = self._keep("step", step)

    def _keep(self, name: str, value: Tensor | None) -> Tensor:
        self.register_buffer(name, value, persistent=False)
        return value  # type: ignore[return-value]  # None where the layer has no such part

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in `dtype`."""
        x = x.to(self.dtype)
        if self.multiplier is not None:
            x = x * self.multiplier
        (groups,) = self._groups
        if groups is None:
            y = self.product(x)
        else:
            shape = (-1, *[1] * (x.ndim - 1))
            y = self.product(x * self.shrinks[groups.current].view(shape))
            y = y * self.factors[groups.current].view(shape)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x [..., K], scaled, times the weight, in `dtype`; without the bias."""
        raise NotImplementedError

    def dequantised(self) -> Tensor:
        """The weight that is multiplied with, [N, K] of `dtype`."""
        scale = self.scale.float()
        if self.format == "nvfp4":
            values, scale = decode_e2m1(_unpacked(self.codes)), scale * self.global_scale.float()
        elif self.format == "int4":
            values = _unpacked(self.codes).float() - 8
        else:
            values = self.codes.float()
        if scale.ndim == 2:  # [N, K / block]
            values = (values.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
        else:
            values = values * (scale[:, None] if scale.ndim else scale)
        return values.to(self.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of x: int8 from -128 to 127, or E4M3; ties go to the even one."""
        scaled = x.float() / self.step
        if self.format == "int8":
            return scaled.round().clamp(-128, 127).to(torch.int8)
        return scaled.clamp(-LARGEST_CODE["fp8_e4m3"], LARGEST_CODE["fp8_e4m3"]).to(_FP8)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class WeightOnlyLinear(QuantizedLinear):
    """The weight is dequantised at every call; activations stay in `dtype`."""

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised())


class FoldedLinear(WeightOnlyLinear):
    """Identity attention's: its weight is read, to be folded, and the layer itself is never called."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantised()


class SimulatedLinear(QuantizedLinear):
    """Codes and back on both sides, then a product in `dtype`."""

    def product(self, x: Tensor) -> Tensor:
        return F.linear((self.encode(x).float() * self.step).to(self.dtype), self.dequantised())


class Int8Linear(QuantizedLinear):
    """Products of int8 codes, exact sums in int32. Raises BackendError for sizes that CUDA can't multiply."""

    def __init__(
        self,
        weight: QuantisedWeight,
        scaling: InputScaling,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
        groups: TimestepGroups | None = None,
    ) -> None:
        super().__init__(weight, scaling, bias=bias, dtype=dtype, device=device, groups=groups)
        _check_sizes(self, device)

    def product(self, x: Tensor) -> Tensor:
        rows = self.encode(x).flatten(0, -2)
        count = rows.shape[0]
        if rows.is_cuda and count < _CUDA_ROWS:
            rows = F.pad(rows, (0, 0, 0, _CUDA_ROWS - count))
        sums = torch._int_mm(rows, self.codes.t())[:count]  # noqa: SLF001 - PyTorch has no public name for it
        y = sums.float() * (self.step * self.scale.float())
        return y.to(self.dtype).reshape(*x.shape[:-1], self.out_features)


class Fp8Linear(QuantizedLinear):
    """Products of E4M3 codes, sums in float32. Raises BackendError for sizes that CUDA can't multiply."""

    def __init__(
        self,
        weight: QuantisedWeight,
        scaling: InputScaling,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
        groups: TimestepGroups | None = None,
    ) -> None:
        super().__init__(weight, scaling, bias=bias, dtype=dtype, device=device, groups=groups)
        _check_sizes(self, device)
        self.one = self._keep("one", torch.ones((), device=device))

    def product(self, x: Tensor) -> Tensor:
        rows = self.encode(x).flatten(0, -2)
        # Scales of channels are multiplied afterwards: sm89 has no product with one a row.
        sums = torch._scaled_mm(  # noqa: SLF001 - PyTorch has no public name for it
            rows, self.codes.t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.float32
        )
        y = sums * (self.step * self.scale.float())
        return y.to(self.dtype).reshape(*x.shape[:-1], self.out_features)


class SimulatedAttention:
    """softmax(q kᵀ / √D) v with E4M3 codes of all four operands, and back. Holds all scores in memory.

    ranges: the largest |q|, |k|, |v|. query, key, value [B, H, S, D] -> [B, H, S, D].
    """

    def __init__(self, ranges: tuple[float, float, float]) -> None:
        self.ranges = ranges

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Both operands take the root of 1 / √D before their product, as the exported graph does.
        root = query.shape[-1] ** -0.25
        q_range, k_range, v_range = self.ranges
        scores = _as_fp8(query * root, q_range * root) @ _as_fp8(key * root, k_range * root).transpose(-1, -2)
        probabilities = _as_fp8(torch.softmax(scores, dim=-1), 1.0)
        return probabilities @ _as_fp8(value, v_range)


def _as_fp8(x: Tensor, amax: float) -> Tensor:
    largest = LARGEST_CODE["fp8_e4m3"]
    step = stored_scale(torch.tensor((amax or 1.0) / largest), x.dtype).item()
    return ((x.float() / step).clamp(-largest, largest).to(_FP8).float() * step).to(x.dtype)


def _packed(codes: Tensor) -> Tensor:
    """4-bit codes [N, K], int8 from -7 to 7 or uint8 patterns -> uint8 [N, K / 2], the first one low."""
    unsigned = (codes + 8).to(torch.uint8) if codes.dtype == torch.int8 else codes
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def _unpacked(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _check_sizes(layer: QuantizedLinear, device: torch.device) -> None:
    multiple = _CUDA_MULTIPLE[layer.format]
    if device.type == "cuda" and (layer.in_features % multiple or layer.out_features % multiple):
        raise BackendError(
            f"a layer of {layer.in_features} inputs and {layer.out_features} outputs has no {layer.format} "
            f"product on CUDA, which takes multiples of {multiple}; let the recipe keep it, or simulate"
        )
