"""A portrait's decoder on the fused kernel chooses and draws what the plain form does."""

from __future__ import annotations

import pytest
import torch

from proteus_deploy.portrait.decoding import Decoding
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.plan import DENSE, CacheSettings
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.portrait_checkpoint import RANDOM_GPT

FLOAT32 = Tolerance(2e-5, "relative", "float32 sums in another order")


@pytest.mark.parametrize(
    "settings",
    [
        DENSE,
        CacheSettings("adsa", 0.5, prefix=0, window=9, cadence=3),
        CacheSettings("adsa", 0.5, prefix=0, window=1),  # too small a window to look ahead
        CacheSettings("sink-window", 0.5, prefix=0, window=9),
    ],
    ids=["dense", "adsa", "adsa, window of 1", "sink-window"],
)
def test_the_same_logits_and_the_same_slots(settings: CacheSettings, device: torch.device) -> None:
    torch.manual_seed(0)
    gpt = Gpt(RANDOM_GPT).eval().requires_grad_(False).to(device)
    features = torch.randn(2, 32, 128).to(device)
    valid = torch.stack([torch.arange(32) >= 27, torch.arange(32) >= 20]).to(device)
    tokens = torch.randint(96, (32, 2)).to(device)
    plain, fused = (
        Decoding(gpt, settings, features * valid.unsqueeze(-1), valid, guided=False, kernel=kernel)
        for kernel in ("torch", "triton")
    )
    assert_close("prompt", fused.prefill(), plain.prefill(), FLOAT32)
    for column in tokens:
        got, want = fused.step(column), plain.step(column)
    assert_close("logits", got, want, FLOAT32)
    if settings.policy != "dense":
        assert plain.cache.seen > plain.cache.plan.slots
        assert torch.equal(fused.cache.positions, plain.cache.positions)
