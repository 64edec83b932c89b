"""Both forms of attention give the same numbers, and leave PyTorch's switches as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.training.attention import attention_form

FLOAT32 = Tolerance(1e-5, "relative", "float32 sums in another order")
# 8 bits of mantissa: a product, a softmax and a product, each rounded.
BFLOAT16 = Tolerance(1e-2, "relative", "bfloat16 rounding of scores and probabilities")


def attend(form: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, 40, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    )
    with attention_form(form):  # type: ignore[arg-type]
        out = F.scaled_dot_product_attention(query, key, value)
        out.square().sum().backward()
    return out.detach(), *(one.grad for one in (query, key, value) if one.grad is not None)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_forward_and_backward_agree(dtype: torch.dtype, bound: Tolerance) -> None:
    for name, plain, fused in zip(
        ("out", "query", "key", "value"), attend("plain", dtype), attend("fused", dtype), strict=True
    ):
        assert plain.dtype == dtype
        assert_close(name, plain, fused, bound)


@pytest.mark.parametrize("before", [False, True])
def test_switches_are_put_back(before: bool) -> None:
    """Also when what is inside fails."""
    allowed: Any = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    seen = []

    def fail() -> None:
        with attention_form("plain"):
            seen.append(allowed())
            raise ZeroDivisionError

    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert seen == [True]
        assert allowed() == before
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
