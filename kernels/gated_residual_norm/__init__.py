"""Gated residual and next modulated norm in one pass; see README.md for the formula and its cost."""

from proteus_deploy.kernels.gated_residual_norm.op import fused_gated_residual_norm
from proteus_deploy.kernels.gated_residual_norm.reference import gated_residual_norm

__all__ = ["fused_gated_residual_norm", "gated_residual_norm"]
