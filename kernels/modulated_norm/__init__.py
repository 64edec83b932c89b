"""Modulated layer norm of text and video in one pass; see README.md for the formula and its cost."""

from proteus_deploy.kernels.modulated_norm.op import fused_modulated_norm
from proteus_deploy.kernels.modulated_norm.reference import modulated_norm_streams

__all__ = ["fused_modulated_norm", "modulated_norm_streams"]
