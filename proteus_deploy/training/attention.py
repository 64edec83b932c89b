"""Which form of PyTorch's attention training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from proteus_deploy.training.settings import AttentionForm

__all__ = ["attention_form"]


@contextmanager
def attention_form(form: AttentionForm) -> Iterator[None]:
    """Forward and backward inside it use that form.

    "fused" is PyTorch's own choice, which never holds all scores. "plain" multiplies them out, with products
    in the type of the inputs: memory grows with the square of the tokens. It is meant for a few hundred of
    them, in bfloat16 on a CPU.
    """
    if form == "fused":
        yield
        return
    # Without this flag the plain form works in float32 whatever its inputs are.
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
