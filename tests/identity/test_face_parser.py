from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus_deploy.errors import CheckpointError
from proteus_deploy.identity.encoder import normalise_parser_input, normalise_tower_input
from proteus_deploy.identity.face_parser import BiSeNet, BiSeNetSizes, keep_face, load_face_parser


def test_logits_are_those_of_the_public_network(golden: Path, report: Callable[[str], None]) -> None:
    parser = load_face_parser(golden / "face_parser_weights.safetensors")
    expected = load_file(golden / "face_parser_expected.safetensors")
    logits = parser(face=expected["face"])["logits"]
    assert logits.shape == (2, 19, 64, 96)
    error = (logits[:, :, ::4, ::4] - expected["logits_every_4"]).abs().max().item()
    report(f"logits: max error {error:.1e} of values to {expected['logits_every_4'].abs().max():.1f}")
    assert error < 1e-5


def test_the_real_network_has_the_published_size() -> None:
    with torch.device("meta"):
        parser = BiSeNet(BiSeNetSizes((64, 128, 256, 512), context=128, fusion=256, gate=64, head=256))
    # facexlib's 13.3 million less the two heads that serve training.
    heads = 2 * (128 * 64 * 9 + 2 * 64 + 64 * 19)
    assert sum(parameter.numel() for parameter in parser.parameters()) == 13_300_416 - heads


def test_masking_resize_and_normalisation_are_the_published_ones(
    golden: Path, report: Callable[[str], None]
) -> None:
    expected = load_file(golden / "masking_expected.safetensors")
    logits = torch.nn.functional.one_hot(expected["labels"][:, 0], 19).permute(0, 3, 1, 2).float()
    grey, colour = keep_face(expected["pixels"], logits)
    for name, found in (
        ("grey", grey),
        ("colour", colour),
        ("parser_input", normalise_parser_input(expected["pixels"])),
        ("tower_input", normalise_tower_input(grey, 28)),
    ):
        error = (found - expected[name]).abs().max().item()
        report(f"{name}: max error {error:.1e}")
        assert error < 1e-6, name


def test_of_equal_labels_the_first_counts() -> None:
    logits, face = torch.zeros(1, 19, 1, 3), torch.full((1, 3, 1, 3), 0.5)
    logits[:, 1:, :, 1] = 1  # skin, 1, is kept; the background, 0, and the hat, 18, are not
    logits[:, (15, 17), :, 2] = 1  # a necklace before hair
    _, colour = keep_face(face, logits)
    assert colour[0, 0, 0].tolist() == [1.0, 0.5, 1.0]


def broken(golden: Path, folder: Path, change: str) -> Path:
    tensors = load_file(golden / "face_parser_weights.safetensors")
    if change == "missing":
        del tensors["cp.arm16.bn_atten.bias"]
    elif change == "unexpected":
        tensors["cp.extra"] = torch.zeros(1)
    elif change == "shape":
        tensors["cp.conv_head32.bn.weight"] = torch.zeros(3)
    elif change == "labels":
        tensors["conv_out.conv_out.weight"] = tensors["conv_out.conv_out.weight"][:11].clone()
    elif change == "other":
        tensors = {"weight": torch.zeros(2)}
    file = folder / "parser.safetensors"
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "missing: cp.arm16.bn_atten.bias"),
        ("unexpected", "unexpected: cp.extra"),
        ("shape", r"wrongly shaped: cp.conv_head32.bn.weight \[3\] instead of \[8\]"),
        ("labels", "11 labels"),
        ("other", "has no tensor"),
    ],
)
def test_weights_that_do_not_fit(golden: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_face_parser(broken(golden, tmp_path, change))


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_face_parser(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_face_parser(tmp_path / "cut.safetensors")
