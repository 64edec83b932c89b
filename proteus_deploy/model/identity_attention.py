"""Identity attention between transformer blocks, on video tokens only (papers: "injection B")."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from proteus_deploy.kernels.identity_attention import (
    fold_identity_attention,
    folded_identity_attention,
    fused_identity_attention,
    identity_attention,
)
from proteus_deploy.model.config import IdentityAttentionConfig

IdentityForm = Literal["published", "folded", "triton"]


class IdentityAttention(nn.Module):
    """h <- h + gate * Wo softmax(Wq LN(h) K^T / sqrt(D)) V, K and V from the face tokens.

    form: "published" and "folded" are exactly equal, see kernels/identity_attention/reference.py; "triton" is
    the folded form in one kernel.
    """

    def __init__(self, width: int, config: IdentityAttentionConfig, *, form: IdentityForm) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.form = form
        self.norm1 = nn.LayerNorm(config.face_dim)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(config.face_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, video: Tensor, face_tokens: Tensor, gate: Tensor) -> Tensor:
        """video [B, N, d], face_tokens [B or 1, Q, d_face], gate scalar -> video with the residual added."""
        key, value = self.to_kv(self.norm1(face_tokens)).chunk(2, dim=-1)
        weights = {
            "norm_weight": self.norm2.weight,
            "norm_bias": self.norm2.bias,
            "query_weight": self.to_q.weight,
            "out_weight": self.to_out.weight,
        }
        if self.form == "published":
            return identity_attention(
                video, key, value, gate=gate, heads=self.heads, eps=self.norm2.eps, **weights
            )
        folded = fold_identity_attention(key, value, heads=self.heads, **weights)
        attend = fused_identity_attention if self.form == "triton" else folded_identity_attention
        return attend(video, folded, gate=gate, heads=self.heads, eps=self.norm2.eps)
