"""Drawing a token: what is drawn from, how often, and that a seed fixes it."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.sampling import Sampling, draw_token, guide

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])


def draws(sampling: Sampling, count: int = 4000) -> list[int]:
    generators = [Generator().manual_seed(seed) for seed in range(count)]
    return draw_token(LOGITS.expand(count, -1), sampling, generators).tolist()


def test_codes_come_as_often_as_their_probability_says() -> None:
    found = torch.tensor(draws(Sampling(temperature=1.0, top_k=0))).bincount(minlength=5) / 4000
    want = LOGITS[0].softmax(dim=-1)
    assert ((found - want).abs() < 4 * (want * (1 - want) / 4000).sqrt()).all()
    hotter = torch.tensor(draws(Sampling(temperature=3.0, top_k=0))).bincount(minlength=5) / 4000
    want = (LOGITS[0] / 3).softmax(dim=-1)
    assert ((hotter - want).abs() < 4 * (want * (1 - want) / 4000).sqrt()).all()


def test_what_is_left_out_never_comes() -> None:
    assert set(draws(Sampling(top_k=2))) == {0, 1}
    assert set(draws(Sampling(top_k=0, top_p=0.7))) == {0, 1}  # 0.64, then 0.88
    assert set(draws(Sampling(top_k=0, top_p=0.5))) == {0}
    assert set(draws(Sampling(temperature=0))) == {0}
    assert set(draws(Sampling(top_k=1000))) == {0, 1, 2, 3, 4}  # more than there are


def test_a_seed_fixes_it() -> None:
    assert draws(Sampling(top_k=0), 50) == draws(Sampling(top_k=0), 50)


def test_guidance() -> None:
    with_condition, without = torch.randn(2, 3, 5)
    both = torch.cat([with_condition, without])
    assert torch.equal(guide(both, 1.0), both)
    assert torch.equal(guide(both, 4.0), without + 4.0 * (with_condition - without))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance_scale": 0.5}, r"guidance_scale is 0.5; choose 1 \(none\) or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 50.0}, "top_k is 50.0; choose a whole number"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_values_that_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**fields)  # type: ignore[arg-type]
