"""The two rewards of PersonalVideo, as losses: 0 is best.

Source: PersonalVideo (arXiv 2411.17048), identity consistency and semantic consistency, added 1:1.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from proteus_deploy.errors import InputError

__all__ = ["identity_loss", "semantic_loss"]


def identity_loss(reference: Tensor, faces: Tensor) -> Tensor:
    """1 - cosine between the photo's embedding [d] and those of generated faces [K, d], mean of the faces.

    The paper prints the cosine itself as the loss; minimised, that would drive the faces away. Raises
    InputError without a face: who calls leaves frames without one out.
    """
    if faces.ndim != 2 or not len(faces) or faces.shape[1:] != reference.shape:
        raise InputError(
            f"faces are {list(faces.shape)}, the reference {list(reference.shape)}; pass [K, d] with K >= 1, "
            "and [d]"
        )
    return (1 - F.cosine_similarity(faces, reference[None], dim=1)).mean()


def semantic_loss(tuned: Tensor, frozen: Tensor) -> Tensor:
    """KL(softmax(tuned) || softmax(frozen)) of the frames' scores [M] under the prompt.

    Only how scores are spread over the frames counts: a video that stands still to please the first reward
    spreads them evenly, which the frozen model's doesn't. Scores are HPSv2's in the paper; any text-image
    score goes. Raises InputError for other shapes than two of [M].
    """
    if tuned.ndim != 1 or tuned.shape != frozen.shape or not len(tuned):
        raise InputError(
            f"scores are {list(tuned.shape)} and {list(frozen.shape)}; pass one of each frame, [M] and [M]"
        )
    ours, theirs = tuned.log_softmax(0), frozen.detach().log_softmax(0)
    return F.kl_div(theirs, ours, reduction="sum", log_target=True)
