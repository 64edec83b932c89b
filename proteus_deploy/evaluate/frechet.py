"""The Frechet distance between two sets of feature vectors, seen as normal distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["frechet_distance"]


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the square as FID has it (Heusel et al. 2017, equation 6).

    first, second: features [N, D] and [M, D], two or more of each. Computed in float64; m are means and C
    covariances with N - 1. With fewer vectors than dimensions it is biased upwards, so only distances of
    equally many compare.

    Raises InputError for sets that have no covariance, or none in common.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InputError(
            f"features are {list(first.shape)} and {list(second.shape)}; both need two axes and equal widths"
        )
    if min(len(first), len(second)) < 2:
        raise InputError(f"there are {len(first)} and {len(second)} vectors; a covariance needs two of each")
    means = [features.astype(np.float64).mean(axis=0) for features in (first, second)]
    covariances = [
        np.atleast_2d(np.cov(features.astype(np.float64), rowvar=False)) for features in (first, second)
    ]
    # tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(min=0)).sum()
    apart = float(((means[0] - means[1]) ** 2).sum())
    return apart + float(np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross)
