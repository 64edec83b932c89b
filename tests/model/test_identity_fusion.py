"""MIF, and the text sequence with the fused tokens in front ("injection A")."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proteus_deploy import Pipeline
from proteus_deploy.model.identity_fusion import combine_text_and_identity
from proteus_deploy.testing import TOLERANCES, assert_close


def combine_by_loop(text: Tensor, mask: Tensor, fused: Tensor) -> Tensor:
    """What the published code does row by row: fused tokens, valid prompt tokens that fit, zeros."""
    rows = []
    for index, row in enumerate(text):
        tokens = fused[index % fused.shape[0]]
        prompt = torch.stack([*row[mask[index] != 0], *torch.zeros_like(row)])
        rows.append(torch.cat((tokens, prompt))[: text.shape[1]])
    return torch.stack(rows)


def numbers(batch: int, length: int, queries: int, fused_batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    text = torch.randn(batch, length, 6, generator=generator)
    return text, torch.randn(fused_batch, queries, 6, generator=generator)


@given(
    rows=st.integers(2, 12).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3
        )
    ),
    share=st.floats(0, 0.99),
    one_identity=st.booleans(),
    kind=st.sampled_from([torch.int64, torch.bool, torch.float32]),
)
def test_it_equals_the_loop_on_any_mask(
    rows: list[list[bool]], share: float, one_identity: bool, kind: torch.dtype
) -> None:
    mask = torch.tensor(rows).to(kind)
    batch, length = mask.shape
    text, fused = numbers(batch, length, 1 + int(share * (length - 1)), 1 if one_identity else batch)
    # What the encoder leaves in padding must not matter, and a NaN there shows where it does.
    text = text.masked_fill((mask == 0)[..., None], float("nan"))
    got = combine_text_and_identity(text, mask, fused)
    assert got.shape == text.shape
    assert torch.equal(got, combine_by_loop(text, mask, fused))


@pytest.mark.parametrize("valid", [0, 1])
def test_all_or_no_tokens_are_valid(valid: int) -> None:
    text, fused = numbers(2, 9, 4, 2)
    got = combine_text_and_identity(text, torch.full((2, 9), valid), fused)
    assert torch.equal(got[:, :4], fused)
    assert torch.equal(got[:, 4:], text[:, :5] * valid)


def test_padding_becomes_exact_zeros() -> None:
    text, fused = numbers(1, 10, 3, 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]])
    got = combine_text_and_identity(text, mask, fused)
    assert torch.equal(got[:, 3:7], text[:, :4])
    assert not got[:, 7:].any()


def test_the_fused_tokens_take_the_texts_precision() -> None:
    text, fused = numbers(1, 10, 3, 1)
    got = combine_text_and_identity(text.bfloat16(), torch.ones(1, 10, dtype=torch.int64), fused)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[:, :3], fused.bfloat16())


def test_it_can_be_traced_with_dynamic_shapes() -> None:
    """No step depends on the data: one graph serves every mask, batch and length."""

    class Combine(torch.nn.Module):
        def forward(self, text: Tensor, mask: Tensor, fused: Tensor) -> Tensor:
            return combine_text_and_identity(text, mask, fused)

    text, fused = numbers(3, 11, 4, 3)
    example = (text, torch.randint(0, 2, (3, 11)), fused)
    batch, length = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("length", min=6, max=64)
    program = torch.export.export(
        Combine(), example, dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}, {0: batch})
    )
    text, fused = numbers(2, 20, 4, 2)
    for fill in (0.0, 0.4, 1.0):
        mask = (torch.rand(2, 20) < fill).long()
        assert torch.equal(program.module()(text, mask, fused), combine_by_loop(text, mask, fused))


def test_photos_of_a_batch_do_not_see_each_other(parity_pipeline: Pipeline) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = {f"hidden_{i}": torch.randn(3, 10, 16, generator=generator) for i in range(5)}
    inputs |= {
        "identity_text": torch.randn(3, 8, 64, generator=generator),
        "id_cond": torch.randn(3, 1, 40, generator=generator),
    }
    fuse = parity_pipeline.stages["identity_fusion"]
    together = fuse(**inputs)["fused"]
    assert together.shape == (3, 8, 64)
    for index in range(3):
        alone = fuse(**{name: value[index : index + 1] for name, value in inputs.items()})["fused"]
        assert_close(f"photo {index}", together[index : index + 1], alone, TOLERANCES["batch", "latents"])
