"""Statistics of activations: classes, percentiles, merging, and files that were tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.export.activation_recorder import _look_at
from proteus_deploy.export.activation_statistics import (
    BINS,
    ActivationStatistics,
    LayerStatistics,
    bin_of,
    bin_upper_edge,
)

LAYER = "denoiser/block.to_q"
GROUPS = (0, 500)


def layer_of(*groups: Tensor) -> LayerStatistics:
    """Of the rows [N, C] that fell into each group."""
    seen = [_look_at(rows) for rows in groups]
    return LayerStatistics(
        torch.stack([one.amax for one in seen]),
        torch.stack([one.total / max(one.rows, 1) for one in seen]).float(),
        torch.stack([one.histogram for one in seen]),
        torch.tensor([one.rows for one in seen]),
    )


def statistics_of(*groups: Tensor, case: str = "a") -> ActivationStatistics:
    provenance = {"checkpoint": "0" * 64, "settings": {"dtype": "fp32"}, "cases": [{"name": case}]}
    return ActivationStatistics({LAYER: layer_of(*groups)}, GROUPS, provenance)


def assert_same(found: ActivationStatistics, expected: ActivationStatistics) -> None:
    assert found.hash == expected.hash
    for name, layer in expected.layers.items():
        for part in ("amax", "mean_abs", "histogram", "rows"):
            assert torch.equal(getattr(found.layers[name], part), getattr(layer, part)), part


@given(st.floats(min_value=0, max_value=2.0**127, width=32))
def test_every_number_is_below_the_edge_of_its_class_and_not_far(value: float) -> None:
    index = int(bin_of(torch.tensor([value])))
    assert 0 <= index < BINS
    assert value < bin_upper_edge(index)
    if 0 < index < BINS - 1:
        assert value >= bin_upper_edge(index - 1)
        assert bin_upper_edge(index) <= value * 17 / 16


def test_classes_at_the_edges() -> None:
    values = torch.tensor([0.0, 2.0**-24, 1.0, 1.0625, 2.0, 2.0**24, float("inf")])
    assert bin_of(values).tolist() == [0, 1, 385, 386, 401, BINS - 1, BINS - 1]


@pytest.mark.parametrize("share", [0.5, 0.99, 0.999, 1.0])
def test_percentile_is_at_most_a_sixteenth_too_large(share: float) -> None:
    rows = torch.randn(4001, 3)
    found = statistics_of(rows, torch.zeros(0, 3)).percentile(LAYER, share)
    ordered = rows.abs().flatten().sort().values
    exact = float(ordered[max(-(-int(share * len(ordered) * 1000) // 1000), 1) - 1])
    assert exact <= found <= exact * 17 / 16
    assert statistics_of(rows, rows).percentile(LAYER, 1.0) == float(rows.abs().max())


def test_percentile_of_one_group_and_of_none() -> None:
    found = statistics_of(torch.ones(5, 2), 8 * torch.ones(5, 2))
    assert found.percentile(LAYER, 0.5, group=0) == 1.0
    assert found.percentile(LAYER, 0.5, group=1) == 8.0
    assert statistics_of(torch.zeros(0, 2), torch.ones(1, 2)).percentile(LAYER, 0.9, group=0) == 0.0
    for share, group in ((0.0, None), (1.5, None), (0.5, 2), (0.5, -1)):
        with pytest.raises(InputError):
            found.percentile(LAYER, share, group=group)


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(InputError, match=r"nothing of 'denoiser/nowhere'.*1 layers of denoiser"):
        statistics_of(torch.ones(1, 2), torch.ones(1, 2)).amax("denoiser/nowhere")


def test_merging_is_as_if_all_had_been_seen_at_once() -> None:
    parts = [[torch.randn(n, 5) for n in sizes] for sizes in ((3, 0), (7, 2), (0, 1))]
    merged = ActivationStatistics.merge(
        [statistics_of(*one, case=str(index)) for index, one in enumerate(parts)]
    )
    whole = layer_of(*(torch.cat(rows) for rows in zip(*parts, strict=True)))
    layer = merged.layers[LAYER]
    assert torch.equal(layer.amax, whole.amax)
    assert torch.equal(layer.histogram, whole.histogram)
    assert layer.rows.tolist() == [10, 3]
    # Means are rounded to float32 once for each part and once at the end.
    torch.testing.assert_close(layer.mean_abs, whole.mean_abs, rtol=4e-7, atol=0)
    assert [case["name"] for case in merged.provenance["cases"]] == ["0", "1", "2"]


def test_what_does_not_belong_together_is_not_merged() -> None:
    one = statistics_of(torch.ones(2, 3), torch.ones(2, 3))
    others: list[tuple[ActivationStatistics, str]] = [
        (replace(one, provenance={**one.provenance, "checkpoint": "1" * 64}), "checkpoint"),
        (replace(one, provenance={**one.provenance, "settings": {}}), "settings"),
        (replace(one, groups=(0, 400)), "timestep groups"),
        (replace(one, layers={}), "only in one"),
        (statistics_of(torch.ones(2, 4), torch.ones(2, 4)), "channels"),
    ]
    for other, message in others:
        with pytest.raises(InputError, match=message):
            ActivationStatistics.merge([one, other])
    with pytest.raises(InputError, match="no statistics"):
        ActivationStatistics.merge([])


def test_saved_and_read_back(tmp_path: Path) -> None:
    found = statistics_of(torch.randn(3, 4), torch.randn(2, 4))
    for name in ("one", "two"):
        found.save(tmp_path / name)
    read = ActivationStatistics.load(tmp_path / "one")
    assert_same(read, found)
    assert (read.groups, read.provenance) == (found.groups, found.provenance)
    for file in ("statistics.json", "statistics.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with pytest.raises(InputError, match="already exists"):
        found.save(tmp_path / "one")


def _alter_json(folder: Path, **changes: object) -> None:
    file = folder / "statistics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _alter_tensors(folder: Path, **changes: Tensor | None) -> None:
    import hashlib

    file = folder / "statistics.safetensors"
    tensors = load_file(file)
    for part, value in changes.items():
        tensors.pop(f"{LAYER}:{part}")
        if value is not None:
            tensors[f"{LAYER}:{part}"] = value
    save_file(tensors, file)
    _alter_json(folder, sha256={file.name: hashlib.sha256(file.read_bytes()).hexdigest()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "statistics.json").unlink(), r"statistics\.json is missing"),
        (lambda folder: (folder / "statistics.json").write_text("{"), "not readable JSON"),
        (lambda folder: _alter_json(folder, format=2), "format 2; this version reads 1"),
        (lambda folder: _alter_json(folder, layers="all"), "no statistics document"),
        (lambda folder: _alter_json(folder, groups=[]), "no statistics document"),
        (lambda folder: (folder / "statistics.safetensors").unlink(), r"statistics\.safetensors is missing"),
        (lambda folder: (folder / "statistics.safetensors").write_bytes(b"x"), "is not the file that"),
        (lambda folder: _alter_json(folder, layers=["denoiser/other"]), "no amax of denoiser/other"),
        (lambda folder: _alter_tensors(folder, rows=None), f"no rows of {LAYER}"),
        (lambda folder: _alter_tensors(folder, rows=torch.tensor([1, 2, 3])), "fits no layer with 2 groups"),
        (lambda folder: _alter_tensors(folder, amax=torch.ones(2, 4).double()), "float64"),
        (lambda folder: _alter_tensors(folder, amax=torch.ones(4)), "fits no layer"),
        (lambda folder: _alter_tensors(folder, amax=-torch.ones(2, 4)), "negative number or NaN"),
        (lambda folder: _alter_tensors(folder, mean_abs=torch.full((2, 4), torch.nan)), "negative number"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "statistics"
    statistics_of(torch.randn(3, 4), torch.randn(2, 4)).save(folder)
    damage(folder)
    with pytest.raises(InputError, match=message):
        ActivationStatistics.load(folder)
