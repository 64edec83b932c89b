"""LlamaGen's tokenizer: published names and sizes, and codes that lead back to pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from proteus_deploy.errors import CheckpointError
from proteus_deploy.portrait.config import VqConfig
from proteus_deploy.portrait.vq import VqModel
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.portrait_checkpoint import RANDOM_VQ


def random_vq(config: VqConfig = RANDOM_VQ) -> VqModel:
    torch.manual_seed(0)
    return VqModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("mult", "millions"), [((1, 1, 2, 2, 4), 72), ((1, 2, 2, 4), 70)], ids=["VQ-16", "VQ-8"]
)
def test_sizes_are_the_published_ones(mult: tuple[int, ...], millions: int) -> None:
    with torch.device("meta"):
        vq = VqModel(VqConfig(encoder_ch_mult=mult, decoder_ch_mult=mult))
    count = sum(parameter.numel() for parameter in vq.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.5)
    names = vq.state_dict().keys()
    last = len(mult) - 1
    for name in (
        "encoder.conv_in.weight",
        "encoder.conv_blocks.0.res.1.norm2.bias",
        "encoder.conv_blocks.0.downsample.conv.weight",
        f"encoder.conv_blocks.{last}.attn.1.proj_out.weight",
        f"encoder.conv_blocks.{last}.res.0.nin_shortcut.weight",
        "encoder.mid.1.q.weight",
        "encoder.norm_out.weight",
        "decoder.conv_in.bias",
        "decoder.mid.2.conv1.weight",
        "decoder.conv_blocks.0.attn.2.v.bias",
        "decoder.conv_blocks.0.upsample.conv.weight",
        f"decoder.conv_blocks.{last}.res.2.conv2.weight",
        "decoder.conv_out.weight",
        "quantize.embedding.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
    ):
        assert name in names
    assert f"encoder.conv_blocks.{last}.downsample.conv.weight" not in names
    assert f"decoder.conv_blocks.{last}.upsample.conv.weight" not in names


def test_pictures_come_out_at_the_size_that_goes_in() -> None:
    vq = random_vq(replace(RANDOM_VQ, encoder_ch_mult=(1, 1, 2), decoder_ch_mult=(1, 1, 2)))
    codes = vq.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert codes.shape == (2, 64)
    assert codes.dtype == torch.int64
    assert vq.decode(codes).shape == (2, 3, 32, 32)


def test_codes_run_row_by_row() -> None:
    vq = random_vq()
    codes = torch.arange(16).unsqueeze(0)
    vectors = vq.quantize.vectors()
    grid = torch.stack([torch.stack([vectors[4 * row + column] for column in range(4)]) for row in range(4)])
    want = vq.decode_vectors(grid.permute(2, 0, 1).unsqueeze(0))
    assert_close("pixels", vq.decode(codes), want, Tolerance(1e-5, "relative", "another memory layout"))
    assert not torch.allclose(vq.decode(codes.view(1, 4, 4).transpose(1, 2).flatten(1)), want)


@pytest.mark.parametrize("unit", [True, False])
def test_the_nearest_code_is_the_nearest(unit: bool) -> None:
    book = random_vq(replace(RANDOM_VQ, codebook_l2_norm=unit)).quantize
    features = torch.randn(2, 8, 3, 5)
    flat = features.permute(0, 2, 3, 1).flatten(0, 2)
    flat = functional.normalize(flat, dim=1) if unit else flat
    want = torch.cdist(flat.double(), book.vectors().double()).argmin(dim=1)
    assert torch.equal(book.nearest(features).flatten(), want)
    if unit:
        assert torch.allclose(book.vectors().norm(dim=1), torch.ones(96))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ch": 48}, "ch is 48; its norms have 32 groups"),
        ({"encoder_ch_mult": (), "decoder_ch_mult": ()}, "encoder_ch_mult is empty"),
        ({"decoder_ch_mult": (1, 1, 2)}, "encoder_ch_mult has 2 levels and decoder_ch_mult 3"),
    ],
)
def test_sizes_that_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(RANDOM_VQ, **fields)  # type: ignore[arg-type]
