"""The transformer as it is trained computes what the serving stages compute, under the published keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.model.config import read_transformer_config
from proteus_deploy.model.identity_fusion import combine_text_and_identity
from proteus_deploy.model.networks import transformer_networks
from proteus_deploy.model.transformer import rotary_tables
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.testing import TOLERANCES, assert_close
from proteus_deploy.tiny.checkpoint import TRANSFORMER
from proteus_deploy.training.checkpoints import load_network, new_network, noise_schedule, write_checkpoint
from proteus_deploy.training.network import TrainableTransformer, initialise


def inputs_of(fake: ModuleType, network: TrainableTransformer, count: int = 2) -> dict[str, Tensor]:
    """Inputs of `forward` for different clips at different timesteps."""
    clips = [fake.random_clip(network.config, index) for index in range(count)]
    stacked = {key: torch.stack([clip[key] for clip in clips]) for key in clips[0]}
    latents = stacked["latent_mean"]
    condition = torch.zeros_like(latents)
    condition[:, 0] = stacked["condition"][:, 0, 0]
    return {
        "noisy": latents,
        "condition": condition,
        "timesteps": torch.tensor([999, 3, 500][:count]),
        "prompt": stacked["prompt"],
        "prompt_mask": stacked["prompt_mask"],
        "identity": stacked["identity"],
        "id_cond": stacked["id_cond"][:, 0],
        "image_states": stacked["image_states"][:, 0],
    }


def test_published_keys(tiny_checkpoint: Path) -> None:
    """Keys and shapes of the file; what is loaded is what is written."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    state = load_network(checkpoint).published_state()
    with safe_open(next((tiny_checkpoint / "transformer").glob("*.safetensors")), framework="pt") as opened:
        stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in stored.items()
    }
    assert all(torch.equal(state[key], value.float()) for key, value in stored.items())


def test_a_checkpoint_comes_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """float32 on disk gives the same bits; everything else is the base's, and replacing is whole."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    network = load_network(checkpoint)
    for value in network.published_state().values():
        value.add_(1e-3)
    for _ in range(2):
        write_checkpoint(tiny_checkpoint, network.published_state(), tmp_path / "new", dtype="fp32")
    again = load_network(Checkpoint.open(tmp_path / "new"))
    ours, theirs = network.published_state(), again.published_state()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    names = {file.relative_to(tiny_checkpoint) for file in tiny_checkpoint.rglob("*") if file.is_file()}
    assert names == {
        file.relative_to(tmp_path / "new") for file in (tmp_path / "new").rglob("*") if file.is_file()
    }
    half = write_checkpoint(tiny_checkpoint, ours, tmp_path / "half", dtype="fp16")
    assert load_network(Checkpoint.open(half)).published_state()["proj_out.weight"].dtype == torch.float32


def test_links_are_followed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A downloaded checkpoint is a folder of links; a new one stands on its own, without what is hidden."""
    base = make_checkpoint("base")
    assert (base / "text_encoder").is_symlink()
    (base / ".cache").mkdir()
    (base / ".cache" / "stamp").touch()
    (base / "again").symlink_to(base)
    state = load_network(Checkpoint.open(base)).published_state()
    new = write_checkpoint(base, state, tmp_path / "deep" / "new")
    assert not [file for file in new.rglob("*") if file.is_symlink()]
    assert not (new / ".cache").exists()
    assert not (new / "again").exists()
    (base / "model_index.json").unlink()
    checkpoint = Checkpoint.open(new)
    assert checkpoint.tokenizer.is_dir()
    assert any((new / "text_encoder").glob("*.safetensors"))


@pytest.mark.parametrize("folder", ["tiny", "parity"])
def test_forward_is_the_serving_stages(
    fake: ModuleType, folder: str, tiny_checkpoint: Path, parity: Path
) -> None:
    """Three clips at once against fusion, schedule, combine and denoiser for each alone."""
    checkpoint = Checkpoint.open(tiny_checkpoint if folder == "tiny" else parity / "checkpoint")
    network = load_network(checkpoint)
    inputs = _sized_inputs(checkpoint)
    with torch.inference_mode():
        got = network(**inputs)
        factory = NetworkFactory(checkpoint)
        stages = {
            name: factory(name).materialise(torch.float32)
            for name in ("identity_fusion", "identity_schedule", "denoiser")
        }
        want = torch.cat([_serve(checkpoint, stages, inputs, index) for index in range(3)])
    assert float(want.std()) > 0.01
    assert_close("velocity", got, want, TOLERANCES["batch", "latents"])
    assert not torch.allclose(got[0], got[1])


def _sized_inputs(checkpoint: Checkpoint) -> dict[str, Tensor]:
    config, generator = checkpoint.transformer, torch.Generator().manual_seed(0)
    backbone, fusion = config.backbone, config.fusion
    assert fusion is not None
    length = fusion.queries + 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator)

    frames = (backbone.sample_frames - 1) // 4 + 1
    size = (frames, backbone.out_channels, backbone.sample_height, backbone.sample_width)
    return {
        "noisy": normal(*size),
        "condition": normal(*size),
        "timesteps": torch.tensor([999, 3, 500]),
        "prompt": normal(length, backbone.text_embed_dim),
        "prompt_mask": (torch.arange(length) < torch.tensor([[2], [length], [5]])).float(),
        "identity": normal(5, backbone.text_embed_dim),
        "id_cond": normal(1, fusion.identity_dim),
        "image_states": normal(5, 10, fusion.image_dim),
    }


def _serve(checkpoint: Checkpoint, stages: dict[str, Any], inputs: dict[str, Tensor], index: int) -> Tensor:
    """One clip through the stages, as the pipeline calls them."""
    one = {name: value[index : index + 1] for name, value in inputs.items()}
    config = checkpoint.transformer
    states = one["image_states"].unbind(1)
    fused = stages["identity_fusion"](one["identity"], one["id_cond"], *states)
    tokens = stages["identity_schedule"](fused, one["id_cond"], states[-1], one["timesteps"])
    text = combine_text_and_identity(one["prompt"], one["prompt_mask"], fused)
    latents = torch.cat((one["noisy"], one["condition"]), dim=2)
    patch = config.backbone.patch_size
    tables = (
        rotary_tables(config.backbone, latents.shape[1], latents.shape[3] // patch, latents.shape[4] // patch)
        if config.backbone.rotary
        else ()
    )
    gate = torch.full((1,), config.identity_attention.scale)
    velocity: Tensor = stages["denoiser"](latents, text, one["timesteps"], tokens, gate, *tables)
    return velocity


def test_ablations_cut_the_path(fake: ModuleType) -> None:
    """Without text MIF gives the same for any identity prompt; without time TAII tells all steps the same."""
    for ablation, key, replacement in (
        ("fusion_text", "identity", torch.ones(2, 9, 16)),
        ("time_aware", "timesteps", torch.tensor([1, 998])),
    ):
        whole, cut = fake.small_network(), fake.small_network(**{ablation: False})
        inputs = inputs_of(fake, whole)
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Tensor, name: str = name) -> None:
                seen[name] = output  # noqa: B023 - read before the next round

            return hook

        part = "fusion" if ablation == "fusion_text" else "schedule"
        for name, network in (("whole", whole), ("cut", cut)):
            network.get_submodule(part).register_forward_hook(note(name))
        with torch.inference_mode():
            outputs = []
            for values in (inputs, {**inputs, key: replacement}):
                whole(**values), cut(**values)
                outputs.append(dict(seen))
        assert not torch.allclose(outputs[0]["whole"], outputs[1]["whole"]), ablation
        assert torch.equal(outputs[0]["cut"], outputs[1]["cut"]), ablation
        assert not torch.allclose(outputs[0]["cut"], outputs[0]["whole"]), ablation
        cut.select("all")
        cut(**inputs).square().mean().backward()
        missing = [
            name for name, value in cut.named_parameters() if value.requires_grad and value.grad is None
        ]
        assert not missing, "processes would wait for these gradients for ever"


@pytest.mark.parametrize("positions", [False, True])
def test_from_nothing(fake: ModuleType, positions: bool) -> None:
    """The velocity is 0 at first; a seed decides every number; no weight is left as the memory was."""
    config = fake.small_config(use_learned_positional_embeddings=positions)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        first, second, other = (new_network(config, seed=seed) for seed in (3, 3, 4))
    finally:
        torch.use_deterministic_algorithms(False)
    ours = first.published_state()
    assert all(bool(torch.isfinite(value).all()) for value in ours.values())
    assert all(torch.equal(value, second.published_state()[key]) for key, value in ours.items())
    differ = {key for key, value in other.published_state().items() if not torch.equal(value, ours[key])}
    assert len(differ) > len(ours) / 3
    with torch.inference_mode():
        velocity = first(**inputs_of(fake, first))
    assert velocity.shape == (2, 3, 16, 4, 4)
    assert not velocity.any()
    if positions:
        assert float(first.denoiser.patch_embed.pos_embedding.std()) > 0.1


def test_initialise_leaves_the_global_generator_alone(fake: ModuleType) -> None:
    before = torch.get_rng_state()
    initialise(TrainableTransformer(fake.small_config()), seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_clips_that_do_not_fit(fake: ModuleType) -> None:
    network = fake.small_network(fake.small_config(use_learned_positional_embeddings=True))
    clip = fake.random_clip(network.config, 0)
    network.check_sizes(clip)
    latents = clip["latent_mean"]
    for change, message in (
        ({"latent_mean": latents[:, :8]}, "8 channels and 4x4; this transformer takes 16 channels"),
        ({"latent_mean": latents[..., :3]}, "3x4; its patches are 1 frames of 2x2: choose multiples"),
        ({"latent_mean": latents[:2]}, "2 latent frames .* position table is for 3 of 4x4 alone"),
        ({"prompt": clip["prompt"][:4]}, "4 tokens; choose a max_sequence_length above 4, .* up to 8"),
        ({"prompt": torch.zeros(9, 16)}, "prompts have 9 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            network.check_sizes({**clip, **change})
    fake.small_network().check_sizes({**clip, "latent_mean": latents[:2]})


def test_weights_that_do_not_fit(fake: ModuleType) -> None:
    state = fake.small_network().published_state()
    network = TrainableTransformer(fake.small_config())
    with pytest.raises(InputError, match=r"the weights hold 'another\.weight'"):
        network.load_published({**state, "another.weight": torch.zeros(1)})
    del state["proj_out.weight"]
    with pytest.raises(InputError, match=r"the weights lack 'proj_out\.weight' and 0 more keys"):
        network.load_published(state)
    with pytest.raises(InputError, match="trainable is 'some'; choose identity or all"):
        network.select("some")  # type: ignore[arg-type]


def test_other_lineages_are_refused() -> None:
    config = read_transformer_config(
        {key: value for key, value in TRANSFORMER.items() if not key.startswith(("FT_", "FFE_"))}
        | {"_class_name": "ConsisIDTransformer3DModel", "is_train_face": True}
    )
    assert "identity_fusion" not in transformer_networks(config, folded=False)
    with pytest.raises(InputError, match="which has no MIF; training takes a Proteus-ID one"):
        TrainableTransformer(config)


def test_noise_schedule(tiny_checkpoint: Path) -> None:
    """Zero terminal signal, as the checkpoint's scheduler has it."""
    alphas = noise_schedule(Checkpoint.open(tiny_checkpoint))
    assert alphas.shape == (1000,)
    assert alphas[-1] == 0
    assert bool((alphas[1:] < alphas[:-1]).all())


def test_missing_weights(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_network(Checkpoint.open(folder))
