"""What a caller asks for, and its validation against a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from proteus_deploy.adapters.adapter import AdapterUse
from proteus_deploy.control import Control
from proteus_deploy.errors import InputError
from proteus_deploy.model.config import TransformerConfig, shortened
from proteus_deploy.policies.plan import Plan
from proteus_deploy.stage_table import VAE_SPATIAL, fixed_size, sample_size
from proteus_deploy.vae_decode import output_frames

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from numpy.typing import NDArray

    from proteus_deploy.identity.features import IdentityFeatures

    Photo = str | Path | bytes | PIL.Image.Image | NDArray[np.generic]

Scheduler = Literal["dpm", "ddim"]
DynamicGuidance = Literal["published", "corrected"]

_log = logging.getLogger(__name__)

_MAX_PROMPT_CHARACTERS = 20_000
_MAX_STEPS = 1000


@dataclass(frozen=True)
class GenerateRequest:
    """One video. Sizes are in pixels; None takes the checkpoint's own value.

    photo: the reference photo; or, in its place, both of identity and condition_image.
    guidance_scale: 1 or less switches guidance off (and halves the work).
    use_dynamic_cfg with dynamic_cfg "published": the guidance scale follows the timestep, as in the
    authors' code; "corrected": it follows the step index, as CogVideoX's paper code meant it.
    seed: None draws one and records it; 0 is a seed like any other.
    scheduler: None takes the checkpoint's.
    plan: what may be left out of the loop (docs/policies.md); None computes everything.
    adapters: a person's, styles, or several at once (docs/adapters.md).
    control: a control video, for a checkpoint or bundle with a control network (docs/control.md).
    """

    prompt: str
    identity_prompt: str = ""
    negative_prompt: str | None = None
    photo: Photo | None = None
    face_index: int | None = None
    identity: IdentityFeatures | None = None
    condition_image: Photo | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float = 8
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    use_dynamic_cfg: bool = False
    dynamic_cfg: DynamicGuidance = "published"
    seed: int | None = 42
    scheduler: Scheduler | None = None
    max_sequence_length: int | None = None
    max_identity_length: int | None = None
    identity_scale: float | None = None
    plan: Plan | None = None
    adapters: tuple[AdapterUse, ...] = ()
    control: Control | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    def to_json(self) -> dict[str, Any]:
        """JSON-able facts of the request: everything but the images and tensors themselves."""
        document = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_JSON}
        document["photo"] = str(self.photo) if isinstance(self.photo, str | Path) else None
        if self.plan is not None:
            document["plan"] = self.plan.to_json()
        if self.adapters:
            document["adapters"] = [use.to_json() for use in self.adapters]
        if self.control is not None:
            document["control"] = self.control.to_json()
        return document


_NOT_JSON = {"photo", "identity", "condition_image", "plan", "adapters", "control", "metadata"}


def resolve_request(
    request: GenerateRequest, config: TransformerConfig, *, warn: bool = True
) -> GenerateRequest:
    """Fill the None fields from the checkpoint, check every value and make numpy's numbers Python's.

    warn: log it when the published decoder will give another number of frames than asked for.
    Raises InputError naming the field, its value, the rule and what would do.
    """
    if not isinstance(request, GenerateRequest):
        raise InputError(f"the request is {request!r}; pass a GenerateRequest")
    backbone = config.backbone
    _, rows, columns = sample_size(backbone)
    queries = config.fusion.queries if config.fusion else 1
    filled = replace(
        request,
        height=_default(request.height, rows * VAE_SPATIAL),
        width=_default(request.width, columns * VAE_SPATIAL),
        num_frames=_default(request.num_frames, backbone.sample_frames),
        max_sequence_length=_default(request.max_sequence_length, backbone.max_text_seq_length),
        max_identity_length=_default(request.max_identity_length, queries),
        identity_scale=_default(request.identity_scale, config.identity_attention.scale),
        seed=_fresh_seed() if request.seed is None else request.seed,
    )
    _check_types(filled)
    filled = _with_python_numbers(filled)
    _check_source(filled)
    _check_metadata(filled)
    _check_text(filled, config)
    _check_numbers(filled)
    _check_size(filled, config)
    _check_plan(filled)
    filled = replace(filled, adapters=_checked_adapters(filled.adapters))
    filled = replace(filled, control=_checked_control(filled.control))
    if warn:
        _warn_of_extra_frames(filled, config)
    return filled


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _fresh_seed() -> int:
    import secrets

    return secrets.randbits(31)


_TYPES: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (str, "text", ("prompt", "identity_prompt")),
    (
        Integral,
        "a whole number",
        (
            "height",
            "width",
            "num_frames",
            "num_inference_steps",
            "seed",
            "max_sequence_length",
            "max_identity_length",
        ),
    ),
    (Real, "a number", ("fps", "guidance_scale", "identity_scale")),
    (bool, "True or False", ("use_dynamic_cfg",)),
)


def _check_types(request: GenerateRequest) -> None:
    """Requests also come from JSON, where 49 is easily "49", 49.5 or true."""
    for kind, rule, names in _TYPES:
        for name in names:
            value = getattr(request, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise InputError(f"{name} is {value!r}; it must be {rule}")
    if not isinstance(request.negative_prompt, str | None):
        raise InputError(f"negative_prompt is {request.negative_prompt!r}; it must be text or None")
    index: Any = request.face_index
    if index is not None and (isinstance(index, bool) or not isinstance(index, Integral) or index < 0):
        raise InputError(
            f"face_index is {index!r}; it must be a whole number from 0, or None: the largest face"
        )


def _with_python_numbers(request: GenerateRequest) -> GenerateRequest:
    """numpy's numbers are no JSON, and float32 arithmetic isn't what the scheduler was written for."""
    changed: dict[str, Any] = {}
    for kind, _, names in _TYPES:
        if kind in (Integral, Real):
            changed |= {name: _python_number(name, getattr(request, name)) for name in names}
    if request.face_index is not None:
        changed["face_index"] = int(request.face_index)
    return replace(request, **changed)


def _python_number(name: str, value: Any) -> int | float:
    try:
        number = float(value)
    except OverflowError:
        raise InputError(f"{name} is {value!r}; it must be a number that a float can hold") from None
    return int(value) if isinstance(value, Integral) else number


def _check_metadata(request: GenerateRequest) -> None:
    """Now, and not when an hour of work is to be saved."""
    if not isinstance(request.metadata, dict):
        raise InputError(f"metadata is {request.metadata!r}; it must be a dict of JSON values")
    try:
        json.dumps(request.metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"metadata can't be written as JSON ({error}); pass text, numbers, lists and dicts of them"
        ) from error


def _check_source(request: GenerateRequest) -> None:
    from proteus_deploy.identity.features import IdentityFeatures

    if not isinstance(request.identity, IdentityFeatures | None):
        raise InputError(
            f"identity is a {type(request.identity).__name__}; pass IdentityFeatures(id_cond, id_vit_hidden)"
        )
    if request.photo is not None:
        if request.identity is not None or request.condition_image is not None:
            raise InputError("photo and identity/condition_image were both given; pass one or the other")
        return
    if request.identity is None or request.condition_image is None:
        given = "only identity" if request.identity is not None else "only condition_image"
        found = given if request.identity is not None or request.condition_image is not None else "neither"
        raise InputError(f"a request needs photo, or both identity and condition_image; {found} was given")
    if request.face_index is not None:
        raise InputError("face_index chooses a face in photo; it has no meaning with ready identity features")


def _check_text(request: GenerateRequest, config: TransformerConfig) -> None:
    if not request.prompt.strip():
        raise InputError("prompt is empty; describe the video, for instance what the person does and where")
    for name in ("prompt", "identity_prompt", "negative_prompt"):
        value = getattr(request, name) or ""
        if len(value) > _MAX_PROMPT_CHARACTERS:
            raise InputError(f"{name} has {len(value)} characters; at most {_MAX_PROMPT_CHARACTERS} are read")
        half = next(
            (index for index, character in enumerate(value) if "\ud800" <= character <= "\udfff"), None
        )
        if half is not None:
            raise InputError(
                f"{name} has half a character, {value[half]!a}, at position {half}; text must be encodable "
                "as UTF-8, so write the whole character or leave it out"
            )
    longest = config.backbone.max_text_seq_length
    shortest = (config.fusion.queries if config.fusion else 0) + 1
    if not shortest <= request.max_sequence_length <= longest:  # type: ignore[operator]
        raise InputError(
            f"max_sequence_length is {request.max_sequence_length}; "
            f"this checkpoint takes {shortest} to {longest}"
        )
    if fixed_size(config.backbone) and request.max_sequence_length != longest:
        raise InputError(
            f"max_sequence_length is {request.max_sequence_length}; "
            f"this checkpoint's position table needs {longest}"
        )
    if config.fusion and not 1 <= request.max_identity_length <= config.fusion.queries:  # type: ignore[operator]
        raise InputError(
            f"max_identity_length is {request.max_identity_length}; "
            f"this checkpoint takes 1 to {config.fusion.queries}"
        )


def _check_numbers(request: GenerateRequest) -> None:
    import math

    checks = (
        ("num_inference_steps", 1 <= request.num_inference_steps <= _MAX_STEPS, f"1 to {_MAX_STEPS}"),
        (
            "guidance_scale",
            math.isfinite(request.guidance_scale),
            "a finite number; 1 or less switches guidance off",
        ),
        ("identity_scale", math.isfinite(request.identity_scale or 0.0), "a finite number"),
        ("fps", math.isfinite(request.fps) and 0 < request.fps <= 1000, "above 0 and at most 1000"),
        ("seed", 0 <= (request.seed or 0) < 2**63, "0 to 2^63 - 1, or None"),
        ("scheduler", request.scheduler in (None, "dpm", "ddim"), "'dpm', 'ddim' or None"),
        ("dynamic_cfg", request.dynamic_cfg in ("published", "corrected"), "'published' or 'corrected'"),
    )
    for name, holds, rule in checks:
        if not holds:
            raise InputError(f"{name} is {getattr(request, name)!r}; it must be {rule}")


def _check_size(request: GenerateRequest, config: TransformerConfig) -> None:
    backbone = config.backbone
    multiple = VAE_SPATIAL * backbone.patch_size
    for name in ("height", "width"):
        value = getattr(request, name)
        if value < 2 * multiple or value % multiple:
            near = max(2 * multiple, round(value / multiple) * multiple)
            raise InputError(
                f"{name} is {value}; it must be a multiple of {multiple}, at least {2 * multiple}: try {near}"
            )
        largest = getattr(backbone, f"sample_{name}") * VAE_SPATIAL
        if backbone.patch_size_t is not None and value > largest:
            raise InputError(f"{name} is {value}; this checkpoint's rotary grid reaches {largest} pixels")
    step = backbone.temporal_compression_ratio
    frames = request.num_frames
    if frames < step + 1 or (frames - 1) % step:  # type: ignore[operator]
        exact = 2 * step  # of the lengths that can be made, every second one comes out as asked
        near = max(1, round((frames - 1) / exact)) * exact + 1  # type: ignore[operator]
        raise InputError(
            f"num_frames is {frames}; the causal VAE makes 1 + {step}k frames, k >= 1: try {near}"
        )
    if fixed_size(backbone):
        made_for = (
            backbone.sample_frames,
            backbone.sample_height * VAE_SPATIAL,
            backbone.sample_width * VAE_SPATIAL,
        )
        asked = (request.num_frames, request.height, request.width)
        if asked != made_for:
            raise InputError(
                f"num_frames, height, width are {asked}; "
                f"this checkpoint has a position table for {made_for} only"
            )


def _check_plan(request: GenerateRequest) -> None:
    plan: Any = request.plan
    if plan is None:
        return
    if not isinstance(plan, Plan):
        raise InputError(
            f"plan is {shortened(plan)}; pass a Plan (policies.plan_from_json makes one), or None"
        )
    plan.check(steps=request.num_inference_steps, guided=request.guided)


def _checked_adapters(adapters: Any) -> tuple[AdapterUse, ...]:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise InputError(f"adapters is {shortened(adapters)}; pass a tuple of AdapterUse(adapter, scale)")
    for use in adapters:
        if not isinstance(use, AdapterUse):
            raise InputError(f"adapters holds {shortened(use)}; pass AdapterUse(read_adapter(file), scale)")
    return tuple(adapters)


def _checked_control(control: Any) -> Control | None:
    if control is None:
        return None
    if not isinstance(control, Control):
        raise InputError(f"control is {shortened(control)}; pass Control(video, scale), or None")
    return control.checked()


def _warn_of_extra_frames(request: GenerateRequest, config: TransformerConfig) -> None:
    step, asked = config.backbone.temporal_compression_ratio, request.num_frames or 0
    made = output_frames((asked - 1) // step + 1)
    if made != asked:
        exact = [count for count in (asked - step, asked + step) if count > 2 * step]
        _log.warning(
            "num_frames is %d, for which the published decoder makes %d frames; %s would come out as asked",
            asked,
            made,
            " or ".join(map(str, exact)),
        )


def request_digest(request: GenerateRequest) -> dict[str, Any]:
    """What goes into a video's metadata."""
    return {**request.to_json(), **request.metadata}


__all__ = ["GenerateRequest", "request_digest", "resolve_request"]
