"""Layer norm and rotary embedding of queries and keys; see README.md for the formula and its cost."""

from proteus_deploy.kernels.qk_norm_rotary.op import fused_qk_norm_rotary
from proteus_deploy.kernels.qk_norm_rotary.reference import qk_norm_rotary

__all__ = ["fused_qk_norm_rotary", "qk_norm_rotary"]
