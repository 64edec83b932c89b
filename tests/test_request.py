"""Requests: defaults from the checkpoint, and every refusal names the field and what would do."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteus_deploy import GenerateRequest, InputError
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.model.config import TransformerConfig
from proteus_deploy.request import request_digest, resolve_request

SmallRequest = Callable[..., GenerateRequest]


@pytest.fixture(scope="module")
def config(parity: Path) -> TransformerConfig:
    return Checkpoint.open(parity / "checkpoint").transformer


def test_defaults_come_from_the_checkpoint(small_request: SmallRequest, config: TransformerConfig) -> None:
    open_fields = {"height": None, "width": None, "num_frames": None}
    resolved = resolve_request(small_request(**open_fields), config)
    assert (resolved.height, resolved.width, resolved.num_frames) == (64, 96, 9)
    assert (resolved.max_sequence_length, resolved.max_identity_length) == (40, 8)
    assert resolved.identity_scale == 1.0


def test_what_is_given_is_kept(small_request: SmallRequest, config: TransformerConfig) -> None:
    given = small_request(max_sequence_length=9, max_identity_length=1, identity_scale=0.0, seed=0)
    assert resolve_request(given, config) == given


def test_no_seed_draws_one_and_records_it(small_request: SmallRequest, config: TransformerConfig) -> None:
    seeds = {resolve_request(small_request(seed=None), config).seed for _ in range(4)}
    assert None not in seeds
    assert len(seeds) > 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": " \n"}, "prompt is empty; describe"),
    ({"prompt": None}, "prompt is None; it must be text"),
    ({"prompt": ["a"]}, r"prompt is \['a'\]; it must be text"),
    ({"identity_prompt": 3}, "identity_prompt is 3; it must be text"),
    ({"negative_prompt": 3}, "negative_prompt is 3; it must be text or None"),
    ({"prompt": "x" * 20_001}, "prompt has 20001 characters; at most 20000"),
    ({"identity_prompt": "x" * 20_001}, "identity_prompt has 20001"),
    ({"negative_prompt": "x" * 20_001}, "negative_prompt has 20001"),
    ({"prompt": "a \ud83d smile"}, r"prompt has half a character, '\\ud83d', at position 2; .* UTF-8"),
    ({"negative_prompt": "\udcff"}, "negative_prompt has half a character"),
    ({"height": 40}, "height is 40; it must be a multiple of 16, at least 32: try 32"),
    ({"height": 16}, "height is 16; .* try 32"),
    ({"width": 0}, "width is 0; .* try 32"),
    ({"width": -64}, "width is -64; .* try 32"),
    ({"width": 60}, "width is 60; .* try 64"),
    ({"width": "64"}, "width is '64'; it must be a whole number"),
    ({"width": 64.0}, "width is 64.0; it must be a whole number"),
    ({"num_frames": 8}, r"num_frames is 8; .* 1 \+ 4k frames, k >= 1: try 9"),
    ({"num_frames": 1}, "num_frames is 1; .* try 9"),
    ({"num_frames": 0}, "num_frames is 0; .* try 9"),
    ({"num_frames": 14}, "num_frames is 14; .* try 17"),
    ({"num_frames": True}, "num_frames is True; it must be a whole number"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps is 1001; it must be 1 to 1000"),
    ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be a whole number"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number; 1 or less"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
    ({"guidance_scale": "6"}, "guidance_scale is '6'; it must be a number"),
    ({"identity_scale": float("nan")}, "identity_scale is nan; it must be a finite number"),
    ({"fps": 0}, "fps is 0; it must be above 0 and at most 1000"),
    ({"fps": float("nan")}, "fps is nan"),
    ({"fps": 1001}, "fps is 1001"),
    ({"seed": -1}, r"seed is -1; it must be 0 to 2\^63 - 1, or None"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
    ({"scheduler": "euler"}, "scheduler is 'euler'; it must be 'dpm', 'ddim' or None"),
    ({"dynamic_cfg": "other"}, "dynamic_cfg is 'other'; it must be 'published' or 'corrected'"),
    ({"use_dynamic_cfg": "yes"}, "use_dynamic_cfg is 'yes'; it must be True or False"),
    ({"max_sequence_length": 8}, "max_sequence_length is 8; this checkpoint takes 9 to 40"),
    ({"max_sequence_length": 41}, "max_sequence_length is 41; this checkpoint takes 9 to 40"),
    ({"max_identity_length": 0}, "max_identity_length is 0; this checkpoint takes 1 to 8"),
    ({"max_identity_length": 9}, "max_identity_length is 9; this checkpoint takes 1 to 8"),
    ({"identity": None, "condition_image": None}, "needs photo, or both .*; neither was given"),
    ({"condition_image": None}, "only identity was given"),
    ({"identity": None}, "only condition_image was given"),
    ({"face_index": True}, "face_index is True; it must be a whole number from 0"),
    ({"face_index": -1}, "face_index is -1; it must be a whole number from 0"),
    ({"face_index": 0.0}, "face_index is 0.0; it must be a whole number from 0"),
    ({"identity": "me"}, "identity is a str; pass IdentityFeatures"),
    ({"guidance_scale": 10**400}, "guidance_scale is 1000.*; it must be a number that a float can hold"),
    ({"metadata": None}, "metadata is None; it must be a dict"),
    ({"metadata": {"a": object()}}, "metadata can't be written as JSON"),
    ({"metadata": {"a": float("nan")}}, "metadata can't be written as JSON"),
    ({"face_index": 1}, "face_index chooses a face in photo"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_a_bad_value_is_named_with_its_rule(
    small_request: SmallRequest, config: TransformerConfig, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve_request(replace(small_request(), **fields), config)


def test_photo_and_features_together_are_refused(
    small_request: SmallRequest, config: TransformerConfig
) -> None:
    for fields in ({"identity": None}, {"condition_image": None}, {}):
        with pytest.raises(InputError, match="both given; pass one or the other"):
            resolve_request(replace(small_request(), photo="me.jpg", **fields), config)  # type: ignore[arg-type]


def test_numpy_numbers_are_numbers(small_request: SmallRequest, config: TransformerConfig) -> None:
    given = small_request(height=np.int64(32), guidance_scale=np.float32(2), fps=8, seed=np.int64(3))
    resolved = resolve_request(given, config)
    numbers = (resolved.height, resolved.guidance_scale, resolved.fps, resolved.seed)
    assert [(type(number), number) for number in numbers] == [(int, 32), (float, 2), (int, 8), (int, 3)]
    assert json.loads(json.dumps(request_digest(resolved)))["seed"] == 3


@pytest.mark.parametrize("request_", [None, "a prompt", {"prompt": "x"}])
def test_what_is_no_request_is_refused(config: TransformerConfig, request_: Any) -> None:
    with pytest.raises(InputError, match=r"the request is .*; pass a GenerateRequest"):
        resolve_request(request_, config)


@pytest.mark.parametrize(
    ("asked", "warning"),
    [
        (5, "num_frames is 5, for which the published decoder makes 8 frames; 9 would come out as asked"),
        (13, "num_frames is 13, for which .* makes 16 frames; 9 or 17 would come out as asked"),
        (9, None),
        (17, None),
    ],
)
def test_more_frames_than_asked_for_are_announced(
    small_request: SmallRequest,
    config: TransformerConfig,
    asked: int,
    warning: str | None,
) -> None:
    logged: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record)

    logger, handler = logging.getLogger("proteus_deploy.request"), Keep()
    logger.addHandler(handler)
    try:
        resolve_request(small_request(num_frames=asked), config)
    finally:
        logger.removeHandler(handler)
    assert len(logged) == (warning is not None)
    assert warning is None or re.fullmatch(warning, logged[0].getMessage())


@pytest.mark.parametrize("fields", [{"height": 32}, {"num_frames": 5}, {"max_sequence_length": 20}])
def test_learned_positions_allow_one_size_only(
    make_checkpoint: Callable[..., Path], small_request: SmallRequest, fields: dict[str, int]
) -> None:
    learned = Checkpoint.open(make_checkpoint(use_learned_positional_embeddings=True)).transformer
    fitting = {"height": 64, "width": 96, "num_frames": 9}
    resolve_request(small_request(**fitting), learned)
    with pytest.raises(InputError, match="position table"):
        resolve_request(small_request(**{**fitting, **fields}), learned)


def test_the_rotary_grid_of_1_5_has_an_end(
    make_checkpoint: Callable[..., Path], small_request: SmallRequest
) -> None:
    config = Checkpoint.open(make_checkpoint(patch_size_t=2, ofs_embed_dim=48)).transformer
    resolve_request(small_request(height=64, width=96), config)
    with pytest.raises(InputError, match="height is 80; this checkpoint's rotary grid reaches 64 pixels"):
        resolve_request(small_request(height=80, width=96), config)


def test_a_request_is_written_as_json_without_its_tensors(small_request: SmallRequest) -> None:
    document = json.loads(json.dumps(request_digest(small_request(metadata={"note": "test"}))))
    assert document["prompt"] == "A woman waves"
    assert document["note"] == "test"
    assert document["photo"] is None
    assert not {"identity", "condition_image"} & set(document)
    assert GenerateRequest("x", photo=Path("me.jpg")).to_json()["photo"] == "me.jpg"
