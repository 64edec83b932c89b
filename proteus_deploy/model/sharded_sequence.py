"""The denoiser with its tokens shared out among processes (Ulysses sequence parallelism).

All that a block does is done token by token, but for joint attention, which is done head by head. So each
process holds its share of the tokens, and around the attention an all-to-all changes "my tokens, all heads"
into "all tokens, my heads" and back. Weights are whole in every process.

Axes: B batch, P processes, L text tokens, N video tokens, S = L + N, l = ceil(L / P) and n = ceil(N / P) a
process's share of them, s = l + n, H heads, D head size, d = H*D width.
Source: DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from proteus_deploy.kernels.joint_attention import Attention
from proteus_deploy.model.config import BackboneConfig, TransformerConfig
from proteus_deploy.model.fused_block import FusedAttention
from proteus_deploy.model.low_rank import BlockAdapters, LowRank
from proteus_deploy.model.networks import fill_computed_buffers
from proteus_deploy.model.transformer import Denoiser, JointAttention, Rotary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenShares:
    """Which tokens are whose, and the exchanges between the processes of a group.

    Text and video are each cut into P equal shares, so that every process has the same work; the last shares
    are filled up with zero tokens. Those are computed along, but cut away before the attention, which is the
    one place where tokens meet: no mask is needed, and no value depends on them.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        """group: None for all processes."""
        self.group = group
        self.processes = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)
        self.text = self.video = 0  # L and N of the call that is running

    def divide(self, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Every process's [B, L, d] and [B, N, d] -> its own shares, [B, l, d] and [B, n, d]."""
        self.text, self.video = text.shape[1], video.shape[1]
        return self._own(text), self._own(video)

    def _own(self, tokens: Tensor) -> Tensor:
        size = self._share(tokens.shape[1])
        own = tokens[:, self.rank * size : (self.rank + 1) * size]
        return F.pad(own, (0, 0, 0, size - own.shape[1]))

    def _share(self, length: int) -> int:
        return -(-length // self.processes)

    def to_heads(self, parts: Tensor) -> Tensor:
        """My tokens of R tensors, all heads [R, B, s, H, D] -> all tokens, my heads [R, B, H/P, S, D]."""
        sent = parts.unflatten(3, (self.processes, -1)).permute(3, 0, 1, 4, 2, 5)
        received = self._exchange(sent)  # [P, R, B, H/P, s, D]
        streams = received.split((self._share(self.text), self._share(self.video)), dim=-2)
        pieces = []
        for stream, length in zip(streams, (self.text, self.video), strict=True):
            size = stream.shape[-2]
            pieces += [share[..., : max(length - i * size, 0), :] for i, share in enumerate(stream)]
        return torch.cat(pieces, dim=-2)

    def to_tokens(self, attended: Tensor) -> Tensor:
        """All tokens, my heads [B, H/P, S, D] -> my tokens, all heads [B, s, d]."""
        streams = attended.transpose(1, 2).split((self.text, self.video), dim=1)
        text, video = self._share(self.text), self._share(self.video)
        batch, heads, _, head_size = attended.shape
        sent = attended.new_zeros(self.processes, batch, text + video, heads, head_size)
        for stream, start, size in zip(streams, (0, text), (text, video), strict=True):
            # Few tokens make fewer pieces than there are processes: the others' shares are padding alone.
            for share, piece in zip(sent, stream.split(size, dim=1), strict=False):
                share[:, start : start + piece.shape[1]] = piece
        return self._exchange(sent).permute(1, 2, 0, 3, 4).flatten(2)

    def gather_video(self, patches: Tensor) -> Tensor:
        """My patches [B, n, c] -> all patches, in every process [B, N, c]."""
        shares = [torch.empty_like(patches) for _ in range(self.processes)]
        torch.distributed.all_gather(shares, patches.contiguous(), group=self.group)
        return torch.cat(shares, dim=1)[:, : self.video]

    def _exchange(self, sent: Tensor) -> Tensor:
        """Part i of [P, ...] goes to process i, and part i of the result came from it."""
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=self.group)
        return received


class SequenceParallelAttention(JointAttention):
    """`JointAttention` on a share of the tokens: the same parameters, a share of the heads."""

    def __init__(self, config: BackboneConfig, attention: Attention, shares: TokenShares) -> None:
        super().__init__(config, attention)
        self.shares = shares

    def forward(self, x: Tensor, rotary: Rotary | None, adapter: LowRank | None = None) -> Tensor:
        """x [B, s, d], rotary tables of all S tokens -> [B, s, d]."""
        projected = [each.unflatten(-1, (self.heads, -1)) for each in self.project(x, adapter)]
        query, key, value = self.shares.to_heads(torch.stack(projected))
        query, key = self.place(query, key, rotary)
        return self.merge(self.shares.to_tokens(self.attention(query, key, value)), adapter)


class _FusedSequenceParallelAttention(SequenceParallelAttention, FusedAttention):
    """The same with the fused kernel between exchange and attention."""


class SequenceParallelDenoiser(Denoiser):
    """A whole denoiser's share of the work, on its own weights; every process gets all of the velocity."""

    def __init__(self, config: TransformerConfig, whole: Denoiser, group: ProcessGroup | None) -> None:
        """config: of `whole`. The processes of `group` must divide the heads."""
        form, block = whole.perceiver_cross_attention[0].form, type(whole.transformer_blocks[0])
        attention: Attention = whole.transformer_blocks[0].attn1.attention  # type: ignore[union-attr, assignment]
        with torch.device("meta"):
            super().__init__(config, form=form, block=block, attention=attention)  # type: ignore[arg-type]
            self.shares = TokenShares(group)
            for own in self.transformer_blocks:
                fused = isinstance(own.attn1, FusedAttention)
                attend = _FusedSequenceParallelAttention if fused else SequenceParallelAttention
                own.attn1 = attend(config.backbone, attention, self.shares)
        self.load_state_dict(whole.state_dict(), assign=True)
        fill_computed_buffers(self, next(whole.parameters()).device)
        self.eval().requires_grad_(False)

    def denoise_tokens(
        self,
        text: Tensor,
        video: Tensor,
        time: Tensor,
        rotary: Rotary | None,
        face_tokens: Tensor,
        identity_gate: Tensor,
        adapters: BlockAdapters | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """As `Denoiser.denoise_tokens`: all tokens in (embedding them is little work), all patches out.

        control must be None: residuals aren't divided."""
        assert control is None  # use_sequence_parallel refuses pipelines that have it
        text, video = self.shares.divide(text, video)
        patches = super().denoise_tokens(text, video, time, rotary, face_tokens, identity_gate, adapters)
        return self.shares.gather_video(patches)
