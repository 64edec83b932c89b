"""The stage table of one checkpoint: which graphs it has, with which shapes.

Shapes follow from the checkpoint's configs; ranges of the dynamic axes from ExportRanges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError
from proteus_deploy.model.config import BackboneConfig, TransformerConfig
from proteus_deploy.model.control_config import FRAMES_PER_LATENT, ControlConfig
from proteus_deploy.model.low_rank import MOST_RANK, PROJECTIONS
from proteus_deploy.model.networks import cache_layout, vae_on_meta
from proteus_deploy.stages import Axis, AxisRange, Graph, StageTable, TensorSpec

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint

VAE_SPATIAL = 8
_MAX_TIMESTEPS_PER_CALL = 50
# CogVideoX 1.5 stores an upper bound of the rotary grid as its sample size; this is its published video size.
_SIZE_OF_1_5 = (96, 170)
_MIN_SIDE = 4  # latent pixels: two tokens
# The number of image tokens belongs to the image tower; this holds for checkpoints that come without one.
_PUBLISHED_IMAGE_TOKENS = AxisRange(1, 577, 577)


@dataclass(frozen=True)
class ExportRanges:
    """Largest video that a bundle must serve; None takes the default for the checkpoint.

    Defaults: height and width up to the longer side of the sample size (portrait and landscape), twice
    the sample's frames, one video under guidance (batch 2). Units: pixels and frames.
    max_lora_rank: of all adapters of a video together; 0 for a bundle without inputs for them.
    """

    max_height: int | None = None
    max_width: int | None = None
    max_num_frames: int | None = None
    max_videos: int = 1
    max_lora_rank: int = 0


def sample_size(config: BackboneConfig) -> tuple[int, int, int]:
    """(latent frames, latent height, latent width) that a checkpoint was made for."""
    frames = latent_frames(config.sample_frames, config)
    if config.patch_size_t is not None:
        limits = (config.sample_height, config.sample_width)
        height, width = (min(size, limit) for size, limit in zip(_SIZE_OF_1_5, limits, strict=True))
        return frames, height, width
    return frames, config.sample_height, config.sample_width


def latent_frames(num_frames: int, config: BackboneConfig) -> int:
    """Latent frames of a video, padded up to a whole number of temporal patches (CogVideoX 1.5)."""
    frames = (num_frames - 1) // config.temporal_compression_ratio + 1
    patch = config.patch_size_t or 1
    return -(-frames // patch) * patch


def fixed_size(config: BackboneConfig) -> bool:
    """Whether positions tie the checkpoint to its sample size and length.

    Learned tables cover nothing else; the published code would quietly replace them by sinusoids for
    another length, which the model was not trained with.
    """
    return config.learned_positions or not config.rotary


def build_stage_table(
    checkpoint: Checkpoint, ranges: ExportRanges | None = None, *, optional_adapters: bool = False
) -> StageTable:
    """All graphs of a checkpoint. optional_adapters: as PyTorch takes them, in place of `max_lora_rank`, and
    so are the residuals of its control network.

    Raises InputError when a range is out of bounds.
    """
    config, ranges = checkpoint.transformer, ranges or ExportRanges()
    if ranges.max_videos < 1:
        raise InputError(f"max_videos is {ranges.max_videos}; it must be at least 1")
    if ranges.max_num_frames is not None and ranges.max_num_frames < 1:
        raise InputError(f"--max-num-frames is {ranges.max_num_frames}; it must be at least 1")
    if not 0 <= ranges.max_lora_rank <= MOST_RANK:
        raise InputError(f"--max-lora-rank is {ranges.max_lora_rank}; it must be 0 to {MOST_RANK}")
    if ranges.max_lora_rank and not config.backbone.rotary:
        raise InputError(
            f"--max-lora-rank is {ranges.max_lora_rank}, but this denoiser has no rotary positions; adapters "
            "are for those that have: leave it out"
        )
    control = checkpoint.controlnet.config if checkpoint.controlnet is not None else None
    with_adapters = config.backbone.rotary and (optional_adapters or ranges.max_lora_rank)
    side_inputs: list[TensorSpec] = []
    if control is not None:
        side_inputs += _residuals(control, optional=optional_adapters)
    if with_adapters:
        side_inputs += _adapters(config, several=ranges.max_videos > 1, optional=optional_adapters)
    graphs = [
        _text_encoder(checkpoint),
        *_identity_graphs(config),
        *([] if control is None else _control_graphs(control)),
        _denoiser(config, side_inputs, several=ranges.max_videos > 1),
        *_vae_graphs(checkpoint),
    ]
    axes = _axes(config, ranges)
    if with_adapters:
        most = ranges.max_lora_rank or MOST_RANK
        axes["R"] = AxisRange(1, most, most)
    if checkpoint.face_encoder is not None:
        from proteus_deploy.identity.networks import face_graphs, image_tokens

        graphs = [*face_graphs(checkpoint), *graphs]
        tokens = image_tokens(checkpoint)
        axes["M"] = AxisRange(tokens, tokens, tokens)
    return StageTable(axes, tuple(graphs))


def _axes(config: TransformerConfig, ranges: ExportRanges) -> dict[str, AxisRange]:
    backbone = config.backbone
    frames, height, width = sample_size(backbone)
    patch, patch_t = backbone.patch_size, backbone.patch_size_t or 1
    queries = config.fusion.queries if config.fusion else 0
    tokens = backbone.max_text_seq_length
    if fixed_size(backbone):
        fixed = {"f": frames // patch_t, "y": height // patch, "x": width // patch}
        asked = (ranges.max_height, ranges.max_width, ranges.max_num_frames)
        if any(value is not None for value in asked):
            raise InputError(
                "this checkpoint has a position table for one size only "
                f"({backbone.sample_frames} frames, {height * VAE_SPATIAL}x{width * VAE_SPATIAL} pixels); "
                "leave out --max-height, --max-width and --max-num-frames"
            )
        grid = {symbol: AxisRange(size, size, size) for symbol, size in fixed.items()}
        longest_height, longest_width = height, width
        text = AxisRange(tokens, tokens, tokens)
    else:
        longest = max(height, width)
        default_height = default_width = longest
        if backbone.patch_size_t is not None:
            default_height = min(longest, backbone.sample_height)
            default_width = min(longest, backbone.sample_width)
        longest_height = _latents(ranges.max_height, default_height, patch, "--max-height")
        longest_width = _latents(ranges.max_width, default_width, patch, "--max-width")
        if backbone.patch_size_t is not None:
            _check_rotary_grid("--max-height", longest_height, backbone.sample_height)
            _check_rotary_grid("--max-width", longest_width, backbone.sample_width)
        longest_frames = latent_frames(ranges.max_num_frames or 2 * backbone.sample_frames - 1, backbone)
        grid = {
            "f": _range(2 // patch_t or 1, frames // patch_t, longest_frames // patch_t),
            "y": _range(_MIN_SIDE // patch, height // patch, longest_height // patch),
            "x": _range(_MIN_SIDE // patch, width // patch, longest_width // patch),
        }
        text = AxisRange(queries + 1, tokens, tokens)
    batch = 2 * ranges.max_videos
    tile = (-(-height // 2), -(-width // 2))
    return {
        **grid,
        "B": _range(1, 2, batch),
        "I": _range(1, 1, ranges.max_videos),
        "M": _PUBLISHED_IMAGE_TOKENS,
        "L": text,
        "N": AxisRange(1, tokens, tokens),
        "P": AxisRange(1, max(queries, 1), max(queries, 1)),
        "T": AxisRange(1, _MAX_TIMESTEPS_PER_CALL, _MAX_TIMESTEPS_PER_CALL),
        "h": _range(1, tile[0], longest_height),
        "w": _range(1, tile[1], longest_width),
    }


def _range(low: int, middle: int, high: int) -> AxisRange:
    """A range whose opt is inside it: a small maximum pulls min and opt down."""
    return AxisRange(min(low, high), max(min(middle, high), min(low, high)), high)


def _latents(pixels: int | None, default: int, patch: int, flag: str) -> int:
    if pixels is None:
        return default
    multiple = VAE_SPATIAL * patch
    if pixels < VAE_SPATIAL * _MIN_SIDE or pixels % multiple:
        raise InputError(
            f"{flag} is {pixels}; it must be a multiple of {multiple}, at least {VAE_SPATIAL * _MIN_SIDE}"
        )
    return pixels // VAE_SPATIAL


def _check_rotary_grid(flag: str, latents: int, limit: int) -> None:
    """CogVideoX 1.5 cuts its rotary tables from a grid of the sample size; beyond it there is nothing."""
    if latents > limit:
        raise InputError(
            f"{flag} is {latents * VAE_SPATIAL}; the rotary grid ends at {limit * VAE_SPATIAL} pixels"
        )


def _multiple(factor: int, symbol: str) -> Axis:
    return symbol if factor == 1 else f"{factor}{symbol}"


def _text_encoder(checkpoint: Checkpoint) -> Graph:
    vocabulary = int(checkpoint.text_encoder["vocab_size"])
    width = checkpoint.transformer.backbone.text_embed_dim
    return Graph(
        "text_encoder",
        "text_encoder",
        (TensorSpec("input_ids", ("B", "N"), "int64", "tokens", vocabulary),),
        (TensorSpec("text", ("B", "N", width)),),
    )


def _identity_graphs(config: TransformerConfig) -> list[Graph]:
    schedule, fusion = config.schedule, config.fusion
    states = [TensorSpec(f"hidden_{index}", ("I", "M", config.image_dim)) for index in range(5)]
    one_photo = [TensorSpec(spec.name, (1, *spec.axes[1:])) for spec in states]
    id_cond = TensorSpec("id_cond", (1, 1, config.identity_dim))
    timesteps = TensorSpec("timesteps", ("T",), "int64", "timesteps", 1000)
    face_tokens = TensorSpec("face_tokens", ("T", config.face_tokens, schedule.out_dim))
    if fusion is None:
        inputs = (id_cond, *one_photo, timesteps)
        return [Graph("identity_schedule", "identity_schedule", inputs, (face_tokens,))]
    fused_axes = (fusion.queries, fusion.width)
    return [
        Graph(
            "identity_fusion",
            "identity_fusion",
            (
                TensorSpec("identity_text", ("I", "P", fusion.width)),
                TensorSpec("id_cond", ("I", 1, config.identity_dim)),
                *states,
            ),
            (TensorSpec("fused", ("I", *fused_axes)),),
        ),
        Graph(
            "identity_schedule",
            "identity_schedule",
            (TensorSpec("fused", (1, *fused_axes)), id_cond, one_photo[-1], timesteps),
            (face_tokens,),
        ),
    ]


def _adapters(config: TransformerConfig, *, several: bool, optional: bool) -> tuple[TensorSpec, ...]:
    """Inputs of `model.low_rank.BlockAdapters`, one row for one video or one of each row."""
    backbone = config.backbone
    rows = "B" if several else 1
    factors: tuple[Axis, ...] = (rows, backbone.num_layers, len(PROJECTIONS), "R", backbone.width)
    return (
        TensorSpec("adapter_down", factors, optional=optional),
        TensorSpec("adapter_up", factors, optional=optional),
        TensorSpec("adapter_scale", (rows, "R"), "float32", "unit", optional=optional),
    )


def _residuals(control: ControlConfig, *, optional: bool = False) -> tuple[TensorSpec, ...]:
    axes: tuple[Axis, ...] = ("B", "f", "y", "x", control.out_dim)
    return tuple(TensorSpec(name, axes, optional=optional) for name in control.residuals)


def _control_graphs(control: ControlConfig) -> list[Graph]:
    """Of CogVideoX 1.0, where a token frame is a latent frame."""
    backbone, patch = control.backbone, control.backbone.patch_size
    rows, columns = _multiple(patch, "y"), _multiple(patch, "x")
    frames, height, width = (
        _multiple(factor, symbol)
        for factor, symbol in (
            (FRAMES_PER_LATENT, "f"),
            (VAE_SPATIAL * patch, "y"),
            (VAE_SPATIAL * patch, "x"),
        )
    )
    video = TensorSpec("video", (1, frames, control.channels, height, width), fill="unit")
    encoded_channels = control.folded_channels[-1]
    table: tuple[Axis, ...] = ("f", "y", "x", backbone.attention_head_dim)
    inputs = (
        TensorSpec("latents", ("B", "f", control.latent_channels, rows, columns)),
        TensorSpec("encoded", ("B", "f", encoded_channels, rows, columns)),
        TensorSpec("text", ("B", "L", backbone.text_embed_dim)),
        TensorSpec("timestep", ("B",), "int64", "timesteps", 1000),
        TensorSpec("rotary_cos", table, "float32", "cos"),
        TensorSpec("rotary_sin", table, "float32", "sin"),
    )
    encoded = TensorSpec("encoded", (1, "f", encoded_channels, rows, columns))
    return [
        Graph("control_encoder", "control_encoder", (video,), (encoded,)),
        Graph("controlnet", "controlnet", inputs, _residuals(control)),
    ]


def _denoiser(config: TransformerConfig, side_inputs: Sequence[TensorSpec], *, several: bool) -> Graph:
    backbone = config.backbone
    identities = "B" if several else 1  # one identity is broadcast over the guidance pair
    frames = _multiple(backbone.patch_size_t or 1, "f")
    rows, columns = _multiple(backbone.patch_size, "y"), _multiple(backbone.patch_size, "x")
    inputs = [
        TensorSpec("latents", ("B", frames, backbone.in_channels, rows, columns)),
        TensorSpec("text", ("B", "L", backbone.text_embed_dim)),
        TensorSpec("timestep", ("B",), "int64", "timesteps", 1000),
        TensorSpec("face_tokens", (identities, config.face_tokens, config.identity_attention.face_dim)),
        TensorSpec("identity_gate", (1,), "float32", "gate"),
    ]
    if backbone.rotary:
        table: tuple[Axis, ...] = ("f", "y", "x", backbone.attention_head_dim)
        inputs += [
            TensorSpec("rotary_cos", table, "float32", "cos"),
            TensorSpec("rotary_sin", table, "float32", "sin"),
        ]
    velocity = TensorSpec("velocity", ("B", frames, backbone.out_channels, rows, columns))
    return Graph("denoiser", "denoiser", (*inputs, *side_inputs), (velocity,))


def _vae_graphs(checkpoint: Checkpoint) -> list[Graph]:
    channels = int(checkpoint.vae["latent_channels"])
    image = TensorSpec("image", (1, 3, "8h", "8w"), fill="unit")
    encoder = Graph(
        "vae_encoder", "vae_encoder", (image,), (TensorSpec("moments", (1, 2 * channels, "h", "w")),)
    )
    layout = cache_layout(vae_on_meta(checkpoint.vae), channels)

    def caches(prefix: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                f"{prefix}_{index:02d}", (*shape[:3], _multiple(shape[3], "h"), _multiple(shape[4], "w"))
            )
            for index, (_, shape) in enumerate(layout)
        )

    def chunk(name: str, latents: int, frames: int, inputs: tuple[TensorSpec, ...]) -> Graph:
        return Graph(
            name,
            "vae_decoder",
            (TensorSpec("latents", (1, channels, latents, "h", "w")), *inputs),
            (TensorSpec("frames", (1, 3, frames, "8h", "8w")), *caches("cache_out")),
        )

    return [
        encoder,
        chunk("vae_decoder_first_3", 3, 9, ()),
        chunk("vae_decoder_first_2", 2, 8, ()),
        chunk("vae_decoder_next", 2, 8, caches("cache_in")),
    ]
