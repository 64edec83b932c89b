"""transformer/config.json: both lineages, and every value that can't be right is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy import CheckpointError
from proteus_deploy.model.config import LocalFacialConfig, ScheduleConfig, read_transformer_config


@pytest.fixture(scope="module")
def document(parity: Path) -> dict[str, Any]:
    text = (parity / "checkpoint" / "transformer" / "config.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_proteus(document: dict[str, Any]) -> None:
    config = read_transformer_config(document)
    assert config.lineage == "proteus"
    assert isinstance(config.schedule, ScheduleConfig)
    assert config.fusion is not None
    assert (config.identity_dim, config.image_dim, config.face_tokens) == (40, 16, 8)
    assert config.backbone.width == 96
    assert config.backbone.latent_channels == 16


def test_consisid(document: dict[str, Any]) -> None:
    class_name = "ConsisIDTransformer3DModel"
    config = read_transformer_config(document | {"_class_name": class_name, "is_train_face": True})
    assert config.lineage == "consisid"
    assert isinstance(config.schedule, LocalFacialConfig)
    assert config.fusion is None
    assert (config.identity_dim, config.image_dim, config.face_tokens) == (40, 16, 8)


def test_keys_that_older_configs_lack_have_their_published_values(document: dict[str, Any]) -> None:
    later = ("patch_size_t", "patch_bias", "ofs_embed_dim", "freq_shift", "is_kps")
    config = read_transformer_config({key: document[key] for key in document if key not in later})
    assert config.backbone.patch_size_t is None
    assert config.backbone.patch_bias
    assert config.backbone.freq_shift == 0
    assert not config.is_kps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": ...}, "'num_layers' is missing; it is part of every published config"),
        ({"num_layers": "4"}, "'num_layers' is '4'; expected int"),
        ({"num_layers": 4.0}, "'num_layers' is 4.0; expected int"),
        ({"num_layers": True}, "'num_layers' is True; expected int"),
        ({"num_layers": 0}, "'num_layers' is 0; it must be at least 1"),
        ({"cross_attn_interval": 0}, "'cross_attn_interval' is 0"),
        ({"norm_eps": "small"}, "'norm_eps' is 'small'; expected float"),
        ({"freq_shift": "x"}, "'freq_shift' is 'x'; expected float"),
        ({"is_kps": 1}, "'is_kps' is 1; expected bool"),
        ({"activation_fn": "relu"}, "'activation_fn' is 'relu'; only 'gelu-approximate'"),
        ({"attention_head_dim": 20}, "attention_head_dim is 20; .* multiple of 8"),
        ({"in_channels": 16}, "in_channels is 16 and out_channels 16; .* in = 2 x out"),
        ({"FT_output_dim": 32}, "FT_output_dim is 32 but text_embed_dim is 64"),
        ({"FFE_input_fuse_dim": 32}, "FT_output_dim is 64 but FFE_input_fuse_dim is 32"),
        ({"FFE_clip_dim": 41}, "FT_clip_dim is 40 but FFE_clip_dim is 41"),
        ({"FFE_vit_dim": 17}, "FT_vit_dim is 16 but FFE_vit_dim is 17"),
        ({"FFE_heads": 3}, "FFE_query_dim 64 is not a multiple of FFE_heads 3"),
        ({"FT_num_querie": 40}, "FT_num_querie 40 leaves no room for the prompt"),
        ({"FT_depth": 7}, "FT_depth 7 is not a multiple of FT_num_scale 5"),
        ({"FT_depth": 6, "FT_num_scale": 6}, "FT_num_scale is 6; the image tower gives 5"),
        ({"FFE_timestep_activation_fn": "gelu"}, "FFE_timestep_activation_fn is 'gelu'"),
        ({"_class_name": "CogVideoXTransformer3DModel"}, "'CogVideoXTransformer3DModel'; this project loads"),
    ],
)
def test_a_value_that_does_not_fit_is_named(
    document: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    changed = {key: value for key, value in (document | changes).items() if value is not ...}
    with pytest.raises(CheckpointError, match=f"^some/config.json: .*{message}"):
        read_transformer_config(changed, "some/config.json")
