"""Attention of one new query over a cache, with ADSA's scores from the same pass; see README.md."""

from proteus_deploy.kernels.decode_attention.op import fused_decode_attention
from proteus_deploy.kernels.decode_attention.reference import decode_attention

__all__ = ["decode_attention", "fused_decode_attention"]
