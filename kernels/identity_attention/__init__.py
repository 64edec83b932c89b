"""Timestep-gated identity attention; see README.md for the formula and its cost."""

from proteus_deploy.kernels.identity_attention.op import (
    fused_identity_attention,
    fused_identity_attention_unfolded,
)
from proteus_deploy.kernels.identity_attention.reference import (
    FoldedIdentity,
    fold_identity_attention,
    folded_identity_attention,
    identity_attention,
)

__all__ = [
    "FoldedIdentity",
    "fold_identity_attention",
    "folded_identity_attention",
    "fused_identity_attention",
    "fused_identity_attention_unfolded",
    "identity_attention",
]
