"""The transformer's dimensions, read from the `config.json` of either lineage.

Proteus-ID's own names (`FT_…` for MIF, `FFE_…` for TAII) and ConsisID's (`LFE_…`) are mapped to the
field's words here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from proteus_deploy.errors import CheckpointError

Lineage = Literal["proteus", "consisid"]

TRAIN_TIMESTEPS = 1000  # every published scheduler counts 0..999

_IMAGE_SCALES = 5
_LARGEST = 10**6  # no size in a published config comes near it

_LINEAGES: dict[str, Lineage] = {
    "ProteusIDTransformer3DModel": "proteus",
    "ConsisIDTransformer3DModel": "consisid",
}


@dataclass(frozen=True)
class BackboneConfig:
    """CogVideoX image-to-video transformer, 1.0 (`patch_size_t` None) or 1.5."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    patch_size: int
    patch_size_t: int | None
    patch_bias: bool
    time_embed_dim: int
    ofs_embed_dim: int | None
    text_embed_dim: int
    max_text_seq_length: int
    sample_height: int  # in latent pixels
    sample_width: int
    sample_frames: int  # in video frames, as the published configs have it
    temporal_compression_ratio: int
    spatial_interpolation_scale: float
    temporal_interpolation_scale: float
    rotary: bool
    learned_positions: bool
    attention_bias: bool
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latents; the other half of `in_channels` is the condition image."""
        return self.in_channels // 2


@dataclass(frozen=True)
class FusionConfig:
    """MIF: identity tokens from text, face embedding and five image scales."""

    width: int
    queries: int
    depth: int
    scales: int
    heads: int
    head_dim: int
    identity_dim: int
    image_dim: int


@dataclass(frozen=True)
class ScheduleConfig:
    """TAII: identity tokens that depend on the timestep."""

    width: int
    out_dim: int
    queries: int
    depth: int
    heads: int
    identity_dim: int
    image_dim: int
    image_proj_dim: int
    fused_dim: int
    time_channels: int
    time_embed_dim: int


@dataclass(frozen=True)
class LocalFacialConfig:
    """ConsisID's local facial extractor, which plays the part of TAII without a timestep."""

    width: int
    out_dim: int
    queries: int
    depth: int
    scales: int
    heads: int
    head_dim: int
    identity_dim: int
    identity_tokens: int
    ff_mult: int


@dataclass(frozen=True)
class IdentityAttentionConfig:
    interval: int
    heads: int
    head_dim: int
    face_dim: int
    scale: float


@dataclass(frozen=True)
class TransformerConfig:
    lineage: Lineage
    backbone: BackboneConfig
    identity_attention: IdentityAttentionConfig
    fusion: FusionConfig | None  # None: ConsisID, which has no text path for the identity
    schedule: ScheduleConfig | LocalFacialConfig
    is_kps: bool

    @property
    def identity_dim(self) -> int:
        """Width of id_cond: face embedding and image embedding side by side (1280 = 512 + 768)."""
        return self.schedule.identity_dim

    @property
    def image_dim(self) -> int:
        """Width of the image tower's hidden states (1024)."""
        return (
            self.schedule.width if isinstance(self.schedule, LocalFacialConfig) else self.schedule.image_dim
        )

    @property
    def face_tokens(self) -> int:
        return self.schedule.queries


class ConfigReader:
    """Typed reads from a JSON object; a missing key or a wrong type names itself."""

    def __init__(self, document: Mapping[str, Any], source: str) -> None:
        self.document = document
        self.source = source

    def __call__(self, key: str, kind: type[Any], default: Any = ..., *, largest: int = _LARGEST) -> Any:
        value = self.document.get(key, default)
        if value is ...:
            raise CheckpointError(f"{self.source}: {key!r} is missing; it is part of every published config")
        if value is None and default is None:
            return None
        if kind is float and type(value) is int and abs(value) < 2**53:
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.source}: {key!r} is {shortened(value)}; expected {kind.__name__}")
        if kind is int and not 1 <= value <= largest:
            rule = "it must be at least 1" if value < 1 else f"it must be at most {largest}"
            raise CheckpointError(f"{self.source}: {key!r} is {shortened(value)}; {rule}")
        if kind is float and not math.isfinite(value):
            raise CheckpointError(f"{self.source}: {key!r} is {value}; it must be a finite number")
        return value

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = ...) -> Any:
        """A value that must be among those known; a published file that lacks it means `default`."""
        value = self.document.get(key, default)
        if value is ... or not any(_same(value, known) for known in allowed):
            found = "missing" if value is ... else shortened(value)
            known = ", ".join(repr(entry) for entry in allowed)
            raise CheckpointError(f"{self.source}: {key!r} is {found}; this project knows {known}")
        return value


def _same(value: Any, known: Any) -> bool:
    return isinstance(value, bool) == isinstance(known, bool) and bool(value == known)


def shortened(value: Any) -> str:
    """repr of a value from a file, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def read_transformer_config(document: Mapping[str, Any], source: str = "config.json") -> TransformerConfig:
    """Map a published `transformer/config.json` to a TransformerConfig.

    Raises CheckpointError when the class is unknown, a key is missing or mistyped, or dimensions clash.
    """
    class_name = document.get("_class_name")
    if not isinstance(class_name, str) or class_name not in _LINEAGES:
        known = ", ".join(sorted(_LINEAGES))
        raise CheckpointError(f"{source}: _class_name is {class_name!r}; this project loads {known}")
    lineage = _LINEAGES[class_name]
    get = ConfigReader(document, source)
    if lineage == "consisid" and not get("is_train_face", bool, False):
        raise CheckpointError(f"{source}: is_train_face is false, so the checkpoint has no identity modules")
    backbone = _read_backbone(get)
    fusion: FusionConfig | None = None
    schedule: ScheduleConfig | LocalFacialConfig
    if lineage == "proteus":
        fusion, schedule = _read_fusion(get), _read_schedule(get)
        _check_fits(fusion, schedule, backbone, source)
    else:
        schedule = _read_local_facial(get)
    attention = IdentityAttentionConfig(
        interval=get("cross_attn_interval", int),
        heads=get("cross_attn_num_heads", int),
        head_dim=get("cross_attn_dim_head", int),
        face_dim=schedule.out_dim,
        scale=get("local_face_scale", float),
    )
    return TransformerConfig(lineage, backbone, attention, fusion, schedule, get("is_kps", bool, False))


def _read_backbone(get: ConfigReader) -> BackboneConfig:
    rotary = get("use_rotary_positional_embeddings", bool)
    config = BackboneConfig(
        num_layers=get("num_layers", int),
        num_attention_heads=get("num_attention_heads", int),
        attention_head_dim=get("attention_head_dim", int),
        in_channels=get("in_channels", int),
        out_channels=get("out_channels", int),
        patch_size=get("patch_size", int),
        patch_size_t=get("patch_size_t", int, None),
        patch_bias=get("patch_bias", bool, True),
        time_embed_dim=get("time_embed_dim", int),
        ofs_embed_dim=get("ofs_embed_dim", int, None),
        text_embed_dim=get("text_embed_dim", int),
        max_text_seq_length=get("max_text_seq_length", int),
        sample_height=get("sample_height", int),
        sample_width=get("sample_width", int),
        sample_frames=get("sample_frames", int),
        temporal_compression_ratio=get("temporal_compression_ratio", int),
        spatial_interpolation_scale=get("spatial_interpolation_scale", float),
        temporal_interpolation_scale=get("temporal_interpolation_scale", float),
        rotary=rotary,
        learned_positions=get("use_learned_positional_embeddings", bool, False),
        attention_bias=get("attention_bias", bool),
        norm_eps=get("norm_eps", float),
        flip_sin_to_cos=get("flip_sin_to_cos", bool),
        freq_shift=get("freq_shift", float, 0.0),
    )
    check_published_choices(get)
    if config.attention_head_dim % 8:
        raise CheckpointError(
            f"{get.source}: attention_head_dim is {config.attention_head_dim}; the 3D rotary embedding "
            "splits a head into 2/8 time, 3/8 height and 3/8 width, so it must be a multiple of 8"
        )
    if config.in_channels != 2 * config.out_channels:
        raise CheckpointError(
            f"{get.source}: in_channels is {config.in_channels} and out_channels {config.out_channels}; an "
            "image-to-video transformer reads noisy and condition latents side by side, so in = 2 x out"
        )
    return config


def check_published_choices(get: ConfigReader) -> None:
    """Raises CheckpointError where a transformer was built otherwise than every published one."""
    for key, expected in (
        ("activation_fn", "gelu-approximate"),
        ("timestep_activation_fn", "silu"),
        ("norm_elementwise_affine", True),
    ):
        if (found := get.document.get(key, expected)) != expected:
            raise CheckpointError(f"{get.source}: {key!r} is {found!r}; only {expected!r} was ever published")


def _read_fusion(get: ConfigReader) -> FusionConfig:
    depth, scales = get("FT_depth", int), get("FT_num_scale", int)
    if depth % scales:
        raise CheckpointError(f"{get.source}: FT_depth {depth} is not a multiple of FT_num_scale {scales}")
    _check_scales(get, "FT_num_scale", scales)
    return FusionConfig(
        width=get("FT_output_dim", int),
        queries=get("FT_num_querie", int),
        depth=depth,
        scales=scales,
        heads=get("FT_num_heads", int),
        head_dim=get("FT_dim_head", int),
        identity_dim=get("FT_clip_dim", int),
        image_dim=get("FT_vit_dim", int),
    )


def _check_scales(get: ConfigReader, key: str, scales: int) -> None:
    if scales > _IMAGE_SCALES:
        raise CheckpointError(
            f"{get.source}: {key} is {scales}; the image tower gives {_IMAGE_SCALES} hidden states"
        )


def _read_schedule(get: ConfigReader) -> ScheduleConfig:
    if (found := get.document.get("FFE_timestep_activation_fn", "silu")) != "silu":
        raise CheckpointError(
            f"{get.source}: FFE_timestep_activation_fn is {found!r}; only 'silu' was published"
        )
    return ScheduleConfig(
        width=get("FFE_query_dim", int),
        out_dim=get("FFE_output_dim", int),
        queries=get("FFE_num_queries", int),
        depth=get("FFE_layers", int),
        heads=get("FFE_heads", int),
        identity_dim=get("FFE_clip_dim", int),
        image_dim=get("FFE_vit_dim", int),
        image_proj_dim=get("FFE_input_img_dim", int),
        fused_dim=get("FFE_input_fuse_dim", int),
        time_channels=get("FFE_time_channel", int),
        time_embed_dim=get("FFE_time_embed_dim", int),
    )


def _read_local_facial(get: ConfigReader) -> LocalFacialConfig:
    depth, scales = get("LFE_depth", int), get("LFE_num_scale", int)
    if depth % scales:
        raise CheckpointError(f"{get.source}: LFE_depth {depth} is not a multiple of LFE_num_scale {scales}")
    _check_scales(get, "LFE_num_scale", scales)
    return LocalFacialConfig(
        width=get("LFE_vit_dim", int),
        out_dim=get("LFE_output_dim", int),
        queries=get("LFE_num_querie", int),
        depth=depth,
        scales=scales,
        heads=get("LFE_num_heads", int),
        head_dim=get("LFE_dim_head", int),
        identity_dim=get("LFE_id_dim", int),
        identity_tokens=get("LFE_num_id_token", int),
        ff_mult=get("LFE_ff_mult", int),
    )


def _check_fits(
    fusion: FusionConfig, schedule: ScheduleConfig, backbone: BackboneConfig, source: str
) -> None:
    pairs = (
        ("FT_output_dim", fusion.width, "text_embed_dim", backbone.text_embed_dim),
        ("FT_output_dim", fusion.width, "FFE_input_fuse_dim", schedule.fused_dim),
        ("FT_clip_dim", fusion.identity_dim, "FFE_clip_dim", schedule.identity_dim),
        ("FT_vit_dim", fusion.image_dim, "FFE_vit_dim", schedule.image_dim),
    )
    for left, left_value, right, right_value in pairs:
        if left_value != right_value:
            raise CheckpointError(
                f"{source}: {left} is {left_value} but {right} is {right_value}; they must be equal"
            )
    if schedule.width % schedule.heads:
        raise CheckpointError(
            f"{source}: FFE_query_dim {schedule.width} is not a multiple of FFE_heads {schedule.heads}"
        )
    if fusion.queries >= backbone.max_text_seq_length:
        raise CheckpointError(
            f"{source}: FT_num_querie {fusion.queries} leaves no room for the prompt in "
            f"max_text_seq_length {backbone.max_text_seq_length}"
        )
