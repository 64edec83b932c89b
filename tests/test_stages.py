"""The stage table: axes, shapes, profiles, samples, and the checks against them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proteus_deploy import InputError, Pipeline
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.runtime.backend import bind_sizes, resolve_dtype, short_dtype
from proteus_deploy.stage_table import ExportRanges, build_stage_table, latent_frames
from proteus_deploy.stages import (
    AXIS_MEANING,
    AxisRange,
    Graph,
    StageTable,
    TensorSpec,
    axis_size,
    sample_inputs,
    split_axis,
)


@pytest.fixture(scope="module")
def table(parity: Path) -> StageTable:
    return build_stage_table(Checkpoint.open(parity / "checkpoint"))


@pytest.mark.parametrize(("axis", "want"), [("B", (1, "B")), ("8h", (8, "h")), ("16rows", (16, "rows"))])
def test_an_axis_is_a_symbol_with_a_factor(axis: str, want: tuple[int, str]) -> None:
    assert split_axis(axis) == want


@pytest.mark.parametrize("axis", ["", "8", "0h", "h8", "-1h", "8 h", "h+1", "1.5h", "h*w", "08h"])
def test_anything_else_is_refused(axis: str) -> None:
    with pytest.raises(InputError, match="is not a symbol with an optional whole factor"):
        split_axis(axis)


@given(factor=st.integers(1, 99), size=st.integers(1, 999))
def test_a_multiple_of_a_symbol(factor: int, size: int) -> None:
    assert axis_size(f"{factor}h", {"h": size}) == factor * size
    assert axis_size(factor, {}) == factor


@pytest.mark.parametrize("bounds", [(0, 1, 2), (2, 1, 3), (1, 4, 3), (-1, 1, 1)])
def test_a_range_goes_up(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="must satisfy 1 <= min <= opt <= max"):
        AxisRange(*bounds)


def test_the_table_survives_json(table: StageTable) -> None:
    assert StageTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_every_symbol_has_a_range_and_a_meaning(table: StageTable) -> None:
    used = {symbol for graph in table.graphs for symbol in graph.symbols}
    assert used <= set(table.axes)
    assert set(table.axes) <= set(AXIS_MEANING)
    for graph in table.graphs:
        own = set(graph.symbols)
        for spec in graph.outputs:
            assert {split_axis(axis)[1] for axis in spec.axes if isinstance(axis, str)} <= own


def test_the_stages_are_those_of_the_design(table: StageTable) -> None:
    assert table.stages == (
        "text_encoder",
        "identity_fusion",
        "identity_schedule",
        "denoiser",
        "vae_encoder",
        "vae_decoder",
    )


def test_a_profile_has_three_shapes_for_every_input(table: StageTable) -> None:
    graph = table.graph("denoiser")
    profile = table.profile(graph)
    assert set(profile) == {spec.name for spec in graph.inputs}
    assert profile["latents"] == {
        "min": (1, 2, 32, 4, 4),
        "opt": (2, 3, 32, 8, 12),
        "max": (2, 5, 32, 12, 12),
    }
    assert profile["identity_gate"] == {"min": (1,), "opt": (1,), "max": (1,)}
    for shapes in profile.values():
        for low, middle, high in zip(shapes["min"], shapes["opt"], shapes["max"], strict=True):
            assert 1 <= low <= middle <= high


def test_unknown_names_are_answered_with_the_known_ones(table: StageTable) -> None:
    with pytest.raises(InputError, match="no graph 'unet'; the table has text_encoder, identity_fusion"):
        table.graph("unet")
    with pytest.raises(InputError, match="no input 'x'; its inputs are latents, text"):
        table.graph("denoiser").input("x")


def test_sizes_outside_their_range_are_refused_in_words(table: StageTable) -> None:
    table.check({"B": 2, "y": 4})
    with pytest.raises(InputError, match=r"token rows \(height / 16\) \(y\) is 7; .* range is 2 to 6"):
        table.check({"B": 2, "y": 7})


def test_samples_are_the_same_every_time_and_fit_the_contract(table: StageTable) -> None:
    for graph in table.graphs:
        for which in ("min", "opt", "max"):
            sizes = table.sizes(which)
            first, again = (sample_inputs(graph, sizes, seed=3) for _ in range(2))
            assert all(torch.equal(first[name], again[name]) for name in first)
            bound = bind_sizes(graph, first)
            assert bound == {symbol: sizes[symbol] for symbol in graph.symbols}


def test_samples_are_plausible(table: StageTable) -> None:
    inputs = sample_inputs(table.graph("denoiser"), table.sizes("opt"))
    assert torch.equal(inputs["identity_gate"], torch.ones(1))
    unit = inputs["rotary_cos"] ** 2 + inputs["rotary_sin"] ** 2
    assert torch.allclose(unit, torch.ones_like(unit))
    assert torch.equal(inputs["rotary_cos"][..., ::2], inputs["rotary_cos"][..., 1::2])
    assert inputs["timestep"].dtype == torch.int64
    assert 0 <= inputs["timestep"].min() <= inputs["timestep"].max() < 1000
    ids = sample_inputs(table.graph("text_encoder"), table.sizes("max"))["input_ids"]
    assert ids.max() < 400
    image = sample_inputs(table.graph("vae_encoder"), table.sizes("opt"))["image"]
    assert image.abs().max() <= 1
    other = sample_inputs(table.graph("vae_encoder"), table.sizes("opt"), seed=1)["image"]
    assert not torch.equal(image, other)


def test_every_graph_runs_on_its_samples_and_gives_the_shapes_it_declares(
    table: StageTable, parity_pipeline: Pipeline
) -> None:
    for graph in table.graphs:
        for which in ("min", "opt"):
            sizes = table.sizes(which)
            outputs = parity_pipeline.backend.runner(graph.name)(**sample_inputs(graph, sizes))
            assert list(outputs) == [spec.name for spec in graph.outputs]
            for spec in graph.outputs:
                assert tuple(outputs[spec.name].shape) == spec.shape(sizes), (graph.name, spec.name)


TWO = Graph(
    "two",
    "two",
    (TensorSpec("a", ("B", 4, "2h")), TensorSpec("b", ("B", "h"))),
    (TensorSpec("c", ("B",)),),
)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (1, 4, 6)}, r"two: input 'b' is missing; inputs are a \['B', 4, '2h'\], b"),
        ({"a": (1, 4, 6), "b": (1, 3), "z": (1,)}, "'z' is not an input"),
        ({"a": (1, 4), "b": (1, 3)}, r"input 'a' has shape \[1, 4\]; the contract is \['B', 4, '2h'\]"),
        ({"a": (1, 5, 6), "b": (1, 3)}, r"input 'a' has shape \[1, 5, 6\]"),
        ({"a": (1, 4, 7), "b": (1, 3)}, r"input 'a' has shape \[1, 4, 7\]"),
        ({"a": (1, 4, 6), "b": (2, 3)}, r"input 'b' has shape \[2, 3\]; .* with \{'B': 1, 'h': 3\}"),
        ({"a": (1, 4, 6), "b": (1, 4)}, r"input 'b' has shape \[1, 4\]"),
    ],
)
def test_inputs_that_break_the_contract_are_named(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bind_sizes(TWO, {name: torch.zeros(shape) for name, shape in shapes.items()})


def test_stages_check_names_and_shapes(parity_pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="'input_ids' is missing"):
        parity_pipeline.stages["text_encoder"](ids=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"latents .* are needed to make the rotary tables"):
        parity_pipeline.stages["denoiser"](text=torch.zeros(1, 40, 64))
    with pytest.raises(InputError, match="vae_decoder takes 'latents'; got 'z'"):
        parity_pipeline.stages["vae_decoder"](z=torch.zeros(1))


def test_the_vae_decoder_stage_takes_a_whole_video(parity_pipeline: Pipeline) -> None:
    stage = parity_pipeline.stages["vae_decoder"]
    assert stage.inputs == ("latents",)
    assert stage(latents=torch.randn(1, 16, 3, 4, 4))["frames"].shape == (1, 3, 9, 32, 32)


def test_ranges_follow_what_is_asked(parity: Path) -> None:
    checkpoint = Checkpoint.open(parity / "checkpoint")
    asked = ExportRanges(max_height=32, max_width=160, max_num_frames=33, max_videos=3)
    axes = build_stage_table(checkpoint, asked).axes
    assert (axes["y"].max, axes["x"].max, axes["f"].max) == (2, 10, 9)
    assert (axes["B"].max, axes["I"].max) == (6, 3)
    assert axes["y"].opt <= 2, "the tuned size is inside the range"
    for bad, message in (
        (ExportRanges(max_height=40), "--max-height is 40; it must be a multiple of 16"),
        (ExportRanges(max_width=16), "--max-width is 16; .* at least 32"),
        (ExportRanges(max_videos=0), "max_videos is 0"),
    ):
        with pytest.raises(InputError, match=message):
            build_stage_table(checkpoint, bad)


def test_a_position_table_fixes_the_size(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(use_rotary_positional_embeddings=False))
    table = build_stage_table(checkpoint)
    assert not any(table.is_dynamic(symbol) for symbol in ("f", "y", "x", "L"))
    assert table.is_dynamic("B")
    assert "rotary_cos" not in {spec.name for spec in table.graph("denoiser").inputs}
    with pytest.raises(InputError, match="position table for one size only"):
        build_stage_table(checkpoint, ExportRanges(max_height=64))


@pytest.mark.parametrize("patch", [None, 2, 3])
@pytest.mark.parametrize("num_frames", [5, 9, 13, 49, 81])
def test_latent_frames_fill_whole_temporal_patches(
    make_checkpoint: Callable[..., Path], num_frames: int, patch: int | None
) -> None:
    config = Checkpoint.open(make_checkpoint(patch_size_t=patch)).transformer.backbone
    frames = latent_frames(num_frames, config)
    needed = (num_frames - 1) // 4 + 1
    assert frames == math.ceil(needed / (patch or 1)) * (patch or 1)


def test_precisions_have_two_names(table: StageTable) -> None:
    for short, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        assert resolve_dtype(short) == resolve_dtype(str(dtype).removeprefix("torch.")) == dtype
        assert short_dtype(dtype) == short
    with pytest.raises(InputError, match="dtype 'fp8' is unknown; choose from fp32, float32"):
        resolve_dtype("fp8")


def _tensor(document: dict[str, Any]) -> dict[str, Any]:
    return document["graphs"][0]["inputs"][0]  # type: ignore[no-any-return]


BAD_TABLES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.pop("axes"), "the table lacks 'axes'; its fields are axes, graphs"),
    (lambda d: d.update(more=1), "the table has the unknown field 'more'"),
    (lambda d: d.update(axes=[]), r"axes is \[\]; it must be an object"),
    (lambda d: d.update(graphs={}), r"graphs is \{\}; it must be a list"),
    (lambda d: d.update(graphs=[]), "graphs is empty; a table has at least one graph"),
    (lambda d: d["graphs"].append(d["graphs"][0]), "graphs name 'two' twice; every name must be another"),
    (lambda d: d["graphs"][0].pop("stage"), "an entry of graphs lacks 'stage'"),
    (
        lambda d: d["graphs"][0].update(name="../two"),
        "name of a graph is '../two'; a name is 1 to 100 letters",
    ),
    (lambda d: d["graphs"][0].update(inputs=[]), "graph 'two' has no inputs"),
    (lambda d: d["graphs"][0].update(outputs=3), "graph 'two': outputs is 3; it must be a list"),
    (lambda d: d["axes"].pop("h"), "tensor 'a': axis '2h' has no range; the symbols are B"),
    (lambda d: d["axes"]["h"].pop("opt"), r"axes\['h'\] lacks 'opt'; its fields are min, opt, max"),
    (lambda d: d["axes"]["h"].update(opt=2.0), r"axes\['h'\]\['opt'\] is 2.0; it must be a whole number"),
    (lambda d: d["axes"]["h"].update(min=True), r"axes\['h'\]\['min'\] is True; it must be a whole number"),
    (
        lambda d: d["axes"]["h"].update(max=2**31),
        r"axes\['h'\] reaches 2147483648; a size is at most 2147483647",
    ),
    (lambda d: d["axes"]["h"].update(max=2**31 - 1), "axis '2h' reaches above 2147483647"),
    (
        lambda d: d["axes"].update({"2h": {"min": 1, "opt": 1, "max": 1}}),
        r"axes\['2h'\]: a symbol is made of",
    ),
    (lambda d: _tensor(d).update(name="b"), "inputs and outputs name 'b' twice"),
    (lambda d: _tensor(d).update(dtype="int8"), "tensor 'a': dtype is 'int8'; choose from float, float32"),
    (lambda d: _tensor(d).update(dtype=[]), r"tensor 'a': dtype is \[\]; choose from"),
    (lambda d: _tensor(d).update(fill="zeros"), "tensor 'a': fill is 'zeros'; choose from normal, unit"),
    (lambda d: _tensor(d).update(fill="tokens"), "tensor 'a': high is 0; it must be 1 to 2147483647"),
    (lambda d: _tensor(d).update(high="9"), "tensor 'a': high is '9'; it must be a whole number"),
    (lambda d: _tensor(d).update(axes=[0]), "tensor 'a': an axis is 0; a number must be 1 to"),
    (lambda d: _tensor(d).update(axes=[None]), "tensor 'a': an axis is None; it must be a whole number"),
    (lambda d: _tensor(d).update(axes=[True]), "tensor 'a': an axis is True"),
    (lambda d: _tensor(d).update(axes=["2"]), "axis '2' is not a symbol"),
    (lambda d: _tensor(d).update(axes=["9" * 5000 + "h"]), "has no range; the symbols are B, h"),
    (
        lambda d: d["graphs"][0]["outputs"][0].update(axes=["f"]) or d["axes"].update(f=d["axes"]["B"]),
        "output 'c' has the axis 'f', which no input has",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_TABLES, ids=[message for _, message in BAD_TABLES])
def test_json_that_is_no_table_is_refused_by_field(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    table = StageTable({"B": AxisRange(1, 2, 4), "h": AxisRange(1, 2, 3)}, (TWO,))
    document = json.loads(json.dumps(table.to_json()))
    assert StageTable.from_json(document) == table
    change(document)
    with pytest.raises(InputError, match=message):
        StageTable.from_json(document)
