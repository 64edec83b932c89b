"""Inception-V3: its published size, its names, and what its first layer sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from proteus_deploy.errors import CheckpointError
from proteus_deploy.evaluate.inception_network import InceptionFeatures, load_inception_features
from proteus_deploy.testing import Tolerance, assert_close


def narrow_weights() -> dict[str, torch.Tensor]:
    """A sixteenth of the channels; variances near 1, so that signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in InceptionFeatures(16).state_dict().items()}
    weights = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            weights[key] = noise * (2 / shape[1:].numel()) ** 0.5
        elif len(shape) == 1:
            weights[key] = 1 + noise.abs() / 10 if key.endswith(("var", "weight")) else noise / 10
    return weights


def test_the_published_size() -> None:
    """torchvision states 27,161,264 parameters: 2,049,000 for classes, 3,326,696 in the auxiliary branch."""
    with torch.device("meta"):
        network = InceptionFeatures()
    assert sum(parameter.numel() for parameter in network.parameters()) == 27_161_264 - 2_049_000 - 3_326_696
    names = dict(network.named_parameters())
    assert tuple(names["Mixed_6c.branch7x7dbl_2.conv.weight"].shape) == (160, 160, 7, 1)
    assert tuple(names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape) == (384, 384, 3, 1)


def test_the_maps_have_the_published_sides(tmp_path: Path) -> None:
    """35, 17 and 8 places at 299 pixels, with 288, 768 and 2048 channels, here a sixteenth of them."""
    save_file(narrow_weights(), tmp_path / "inception.safetensors")
    network = load_inception_features(tmp_path / "inception.safetensors")
    maps: list[tuple[int, ...]] = []
    for name in ("Mixed_5d", "Mixed_6e", "Mixed_7c"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: maps.append(tuple(output.shape))
        )
    assert network(torch.zeros(1, 3, 299, 299)).shape == (1, 128)
    assert maps == [(1, 18, 35, 35), (1, 48, 17, 17), (1, 128, 8, 8)]


def test_a_file_with_classifiers_and_counters_loads(tmp_path: Path) -> None:
    """The published file has both; older ones lack the counters."""
    weights = narrow_weights()
    extra = {"fc.weight": torch.zeros(2, 2), "AuxLogits.conv0.conv.weight": torch.zeros(3)}
    counters = {
        key.replace("running_var", "num_batches_tracked"): torch.tensor(0) for key in weights if "var" in key
    }
    save_file(weights, tmp_path / "old.safetensors")
    save_file(weights | extra | counters, tmp_path / "new.safetensors")
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(2))
    old, new = (load_inception_features(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    features = old(images)
    assert features.shape == (2, 128)
    assert not old.training
    assert torch.equal(features, new(images))
    # Each image by itself: batch norms use their stored statistics.
    assert_close(
        "alone", old(images[:1]), features[:1], Tolerance(1e-5, "relative", "float32 sums reordered")
    )
    assert not torch.allclose(features[0], features[1])


def test_pixels_are_rescaled_inside_as_the_published_weights_expect(tmp_path: Path) -> None:
    save_file(narrow_weights(), tmp_path / "inception.safetensors")
    network = load_inception_features(tmp_path / "inception.safetensors")
    seen: list[torch.Tensor] = []
    network.Conv2d_1a_3x3.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = torch.zeros(2, 3, 96, 96)
    images[1] = 1
    network(images)
    exact = Tolerance(1e-6, "absolute", "one float32 product and sum")
    assert_close("black", seen[0][0, :, 0, 0], [-0.03, -0.088, -0.188], exact)
    assert_close("white", seen[0][1, :, 0, 0], [0.428, 0.36, 0.262], exact)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "inception.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_inception_features(file)
    save_file({"conv1.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"no tensor 'Conv2d_1a_3x3\.conv\.weight'"):
        load_inception_features(file)
    weights = narrow_weights()
    save_file(weights | {"Conv2d_1a_3x3.conv.weight": torch.zeros(3, 3, 3, 3)}, file)
    with pytest.raises(CheckpointError, match="the first convolution has 3 channels"):
        load_inception_features(file)
    del weights["Mixed_7c.branch_pool.bn.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"missing: Mixed_7c\.branch_pool\.bn\.weight"):
        load_inception_features(file)
