"""A transformer block on the fused Triton kernels: the same parameters, the same result up to rounding.

What the plain block reads and writes between its products, token by token, is here one launch each: norm of
both streams, norm and rotary embedding of queries and keys, gated residual together with the next norm.
"""

from __future__ import annotations

from torch import Tensor

from proteus_deploy.kernels.gated_residual_norm import fused_gated_residual_norm
from proteus_deploy.kernels.joint_attention import Attention, attention
from proteus_deploy.kernels.modulated_norm import fused_modulated_norm
from proteus_deploy.kernels.qk_norm_rotary import fused_qk_norm_rotary
from proteus_deploy.model.config import BackboneConfig
from proteus_deploy.model.low_rank import LowRank
from proteus_deploy.model.transformer import Block, JointAttention, Rotary


class FusedBlock(Block):
    """`Block` for CUDA devices."""

    def __init__(self, config: BackboneConfig, attention: Attention = attention) -> None:
        super().__init__(config, attention)
        self.attn1 = FusedAttention(config, attention)

    def forward(
        self,
        text: Tensor,
        video: Tensor,
        time: Tensor,
        rotary: Rotary | None,
        adapter: LowRank | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Block.forward`."""
        first, second = self.norm1.vectors(time), self.norm2.vectors(time)
        norm1, norm2 = self.norm1.norm, self.norm2.norm
        normed = fused_modulated_norm(
            text,
            video,
            text_shift=first.text_shift,
            text_scale=first.text_scale,
            video_shift=first.video_shift,
            video_scale=first.video_scale,
            weight=norm1.weight,
            bias=norm1.bias,
            eps=norm1.eps,
        )
        text, video, normed = fused_gated_residual_norm(
            text,
            video,
            self.attn1(normed, rotary, adapter),
            text_gate=first.text_gate,
            video_gate=first.video_gate,
            text_shift=second.text_shift,
            text_scale=second.text_scale,
            video_shift=second.video_shift,
            video_scale=second.video_scale,
            weight=norm2.weight,
            bias=norm2.bias,
            eps=norm2.eps,
        )
        transformed, length = self.ff(normed), text.shape[1]
        text = text + second.text_gate * transformed[:, :length]
        return text, video + second.video_gate * transformed[:, length:]


class FusedAttention(JointAttention):
    """`JointAttention` with one launch between its projections and the attention, which may be any."""

    def place(self, query: Tensor, key: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """As `JointAttention.place`; without rotary embedding there is nothing to fuse."""
        if rotary is None:
            return super().place(query, key, rotary)
        return fused_qk_norm_rotary(
            query,
            key,
            query_weight=self.norm_q.weight,
            query_bias=self.norm_q.bias,
            key_weight=self.norm_k.weight,
            key_bias=self.norm_k.bias,
            cos=rotary[0],
            sin=rotary[1],
            eps=self.norm_q.eps,
        )
