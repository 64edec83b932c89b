from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.identity.encoder import IdentityEncoder, normalise_parser_input
from proteus_deploy.identity.face_parser import keep_face, load_face_parser
from proteus_deploy.tiny.face_pack import write_face_encoder
from proteus_deploy.tiny.portrait import draw_portrait, portrait_box


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("face-pack")
    write_face_encoder(folder / "face_encoder", seed=5)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_layout_is_the_published_one(checkpoint: Path) -> None:
    assert set(digests(checkpoint / "face_encoder")) == {
        "EVA02_CLIP_L_336_psz14_s6B.safetensors",
        "image_tower.json",
        "models/antelopev2/glintr_tiny.onnx",
        "models/antelopev2/scrfd_tiny.onnx",
        "parsing_bisenet.safetensors",
    }
    assert sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) < 2_000_000


def test_the_same_seed_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    expected = digests(checkpoint / "face_encoder")
    assert digests(write_face_encoder(tmp_path / "same", seed=5)) == expected
    other = digests(write_face_encoder(tmp_path / "other", seed=6))
    differing = {name for name in expected if other[name] != expected[name]}
    assert differing == set(expected) - {"image_tower.json", "models/antelopev2/scrfd_tiny.onnx"}


def test_the_onnx_files_keep_the_contract(checkpoint: Path) -> None:
    pack = checkpoint / "face_encoder" / "models" / "antelopev2"
    detector, recogniser = onnx.load(pack / "scrfd_tiny.onnx"), onnx.load(pack / "glintr_tiny.onnx")
    shapes = [
        [axis.dim_value for axis in output.type.tensor_type.shape.dim] for output in detector.graph.output
    ]
    cells = [2 * (640 // stride) ** 2 for stride in (8, 16, 32)]
    assert shapes == [[count, width] for width in (1, 4, 10) for count in cells]
    assert len(recogniser.graph.output) == 1
    # insightface takes a graph that starts with such nodes for one that scales its input itself.
    assert not any(node.name.startswith(("Sub", "Mul", "_minus", "_mul")) for node in recogniser.graph.node)


def test_sizes_can_be_chosen(tmp_path: Path) -> None:
    write_face_encoder(
        tmp_path / "face_encoder",
        seed=1,
        face_dim=12,
        pooled_dim=20,
        tower_width=16,
        tower_depth=5,
        tower_heads=2,
        tower_grid=3,
        tower_patch=8,
    )
    encoder = IdentityEncoder.from_checkpoint(tmp_path)
    assert encoder.tower_size == 24
    features, _ = encoder.encode(draw_portrait(0, 256))
    assert features.id_cond.shape == (1, 1, 32)
    assert features.id_vit_hidden[4].shape == (1, 10, 16)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tower_depth": 4}, "tower_depth is 4"),
        ({"tower_width": 30}, "tower_width 30"),
        ({"tower_heads": 0}, "0 heads"),
        ({"face_dim": 0}, "face_dim is 0"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_face_encoder(tmp_path / "x", seed=0, **sizes)
    assert not (tmp_path / "x").exists()


def test_every_portrait_holds_exactly_one_face(checkpoint: Path) -> None:
    detector = IdentityEncoder.from_checkpoint(checkpoint).detector
    for seed in range(24):
        size = (150, 200, 280)[seed % 3]
        faces = detector.detect(np.array(draw_portrait(seed, size)))
        assert len(faces) == 1, f"portrait {seed} at {size}: {[str(face) for face in faces]}"
        error = np.abs(np.subtract(faces[0].box, portrait_box(seed, size))).max() / faces[0].width
        assert error < 0.25, f"portrait {seed} at {size}: {faces[0]}"


def test_noise_and_plain_skin_hold_no_face(checkpoint: Path) -> None:
    detector = IdentityEncoder.from_checkpoint(checkpoint).detector
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    assert detector.detect(noise) == []
    assert detector.detect(np.full((300, 300, 3), (229, 178, 136), np.uint8)) == []


@pytest.mark.parametrize("seed", range(6))
def test_the_random_parser_leaves_most_of_the_face(seed: int, tmp_path: Path) -> None:
    write_face_encoder(tmp_path, seed=seed)
    parser = load_face_parser(tmp_path / "parsing_bisenet.safetensors")
    pixels = torch.from_numpy(np.array(draw_portrait(seed, 256))).permute(2, 0, 1)[None].float() / 255
    _, colour = keep_face(pixels, parser(face=normalise_parser_input(pixels))["logits"])
    white = (colour != pixels).any(dim=1).float().mean().item()
    assert white < 0.4, f"seed {seed}: {white:.0%} painted white"


def test_portraits_are_people_of_their_own() -> None:
    first = draw_portrait(3, 96)
    assert first.mode == "RGB"
    assert first.size == (96, 96)
    assert first.tobytes() == draw_portrait(3, 96).tobytes()
    assert len({draw_portrait(seed, 48).tobytes() for seed in range(8)}) == 8
    with pytest.raises(InputError, match="31 pixels"):
        draw_portrait(0, 31)
