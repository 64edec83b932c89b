"""The benchmarks of portraits on small models, and the tables of docs/portrait.md."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_deploy.benchmarks import portrait_memory, portrait_quality, portrait_tables
from proteus_deploy.benchmarks.limited_process import Outcome
from proteus_deploy.benchmarks.portrait_decode import (
    benchmark_config,
    decode_side_by_side,
    random_gpt,
    set_length,
    summary,
)
from proteus_deploy.benchmarks.portrait_measures import Wish, psnr
from proteus_deploy.errors import InputError
from proteus_deploy.portrait.decoding import Decoding
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.portrait.plan import DENSE, CacheSettings
from proteus_deploy.tiny.portrait_checkpoint import RANDOM_GPT, write_random_portrait
from proteus_deploy.training.tiny_portrait.configs import CACHE

SMALL = replace(RANDOM_GPT, model_type="c2i", cls_token_num=1)
SPARSE = CacheSettings("adsa", 0.5, prefix=2, window=9, cadence=4)
RESULTS = "benchmarks/results/portrait"


def test_sizes_are_on_a_grid_of_1024_tokens() -> None:
    config = benchmark_config("GPT-B")
    assert (config.n_layer, config.dim, config.length) == (12, 768, 1025)
    assert benchmark_config("tiny").length == 1025


def test_every_cache_does_every_position() -> None:
    gpt = random_gpt(SMALL, torch.float32)
    found = decode_side_by_side(gpt, {"dense": DENSE, "adsa": SPARSE}, 2, seed=0)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"dense": 63, "adsa": 63}
    rows = {row["cache"]: row for row in summary([found, found])}
    assert rows["dense"]["faster"] == 1.0
    assert rows["adsa"]["share_of_dense_bytes"] == pytest.approx(33 / 65)
    assert rows["adsa"]["bookkeeping_bytes"] > 0
    assert len(rows["adsa"]["milliseconds_by_position"]) == 16
    seconds = {name: sum(found["seconds"][name]) for name in rows}
    assert rows["adsa"]["faster"] == pytest.approx(seconds["dense"] / seconds["adsa"])


def test_lengths_are_sampled() -> None:
    gpt = random_gpt(SMALL, torch.float32)
    found = decode_side_by_side(gpt, {"dense": DENSE, "adsa": SPARSE}, 1, seed=0, lengths=4)
    assert {len(seconds) for seconds in found["seconds"].values()} == {4 * 2 * 4}


def test_lengths_without_room_are_refused() -> None:
    gpt = random_gpt(SMALL, torch.float32)
    with pytest.raises(InputError, match="8 lengths are too many: the last leaves no room for 8 steps"):
        decode_side_by_side(gpt, {"dense": DENSE, "adsa": SPARSE}, 1, seed=0, lengths=8)


def test_a_decoding_goes_on_from_a_length() -> None:
    gpt = random_gpt(SMALL, torch.float32)
    for settings, filled in ((DENSE, 40), (SPARSE, 33)):
        decoding = Decoding(gpt, settings, torch.tensor([1, 2]), guided=True)
        decoding.prefill()
        decoding.cache.keys.normal_()
        decoding.cache.values.normal_()
        set_length(decoding, 40)
        assert decoding.cache.filled == filled
        for _ in range(6):
            assert torch.isfinite(decoding.step(torch.tensor([1, 2]))).all()
        assert decoding.cache.filled <= decoding.cache.plan.slots


def test_the_largest_batch_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(command: list[str], limits: Any) -> Outcome:
        batch = int(command[command.index("--batch") + 1])
        needed = batch * (100 if command[command.index("--policy") + 1] == "dense" else 55)
        if needed > limits.anonymous_bytes / 2**20:
            return Outcome(None, "killed", 1.0, needed, needed)
        return Outcome({"images_an_hour": 10.0 * batch}, "", 1.0, needed, needed)

    monkeypatch.setattr(portrait_memory, "run_limited", pretend)
    file = tmp_path / "memory.json"
    assert portrait_memory.main(["--memory-gib", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert (rows["dense"]["images"], rows["adsa"]["images"]) == (10, 18)
    assert "ratio 1.80" in capsys.readouterr().out


def test_a_memory_too_small_for_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Outcome(None, "killed", 1.0, 1, 1)
    monkeypatch.setattr(portrait_memory, "run_limited", lambda *_: nothing)
    with pytest.raises(InputError, match="not one image fits the memory"):
        portrait_memory.main(["--json", str(tmp_path / "memory.json")])


def test_a_batch_is_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portrait_memory, "benchmark_config", lambda _size: SMALL)
    assert portrait_memory.main(["--batch", "2", "--policy", "dense", "--size", "tiny"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["step_ms"]) == 4
    assert found["cache_bytes"] == SMALL.cache_bytes(65, 4, 4)


def test_forced_agreement_with_itself_is_whole(tmp_path: Path) -> None:
    painter = TorchPainter.open(write_random_portrait(tmp_path / "portrait"))
    wishes = [Wish(2, 0, 5), Wish(3, 1, 6)]
    captions = [wish.caption for wish in wishes]
    dense = painter.draw_tokens(captions, cache=DENSE, seeds=[5, 6])
    assert portrait_quality.forced_agreement(painter, DENSE, wishes, dense) == [1.0, 1.0]
    other = painter.draw_tokens(captions, cache=DENSE, seeds=[7, 8])
    assert max(portrait_quality.forced_agreement(painter, DENSE, wishes, other)) < 0.5


def test_rows_of_the_benchmark() -> None:
    names = [cell.name for cell in portrait_quality.cells(CACHE, ablations=False)]
    assert len(names) == len(set(names)) == 17
    ablations = portrait_quality.cells(CACHE, ablations=True)
    assert ablations[0].name == "dense"
    assert len({cell.cache for cell in ablations}) == len(ablations)


def test_a_plot_has_gaps_where_nothing_was_drawn(repository: Path) -> None:
    document = json.loads((repository / RESULTS / "policies.json").read_text(encoding="utf-8"))
    described = portrait_tables.plot(document)
    assert re.search(r"adsa: [^;]* at 75, ", described)
    assert re.search(r"random: [^;]* at 50, [^;]* at 100", described)
    assert not re.search(r"random: [^;]* at 75", described)


def test_psnr() -> None:
    black, grey = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))
    assert psnr(black, black) > 60


def test_a_file_of_something_else() -> None:
    with pytest.raises(InputError, match="the file is of 'weather'"):
        portrait_tables.table({"what": "weather"})


def test_the_page_shows_the_tables_of_the_result_files(repository: Path) -> None:
    page = (repository / "docs" / "portrait.md").read_text(encoding="utf-8")
    files = sorted((repository / RESULTS).glob("*.json"))
    shown = [file.name for file in files if file.name != "videos.json"]
    assert set(shown) >= {"policies.json", "ablations.json", "decode.json", "memory.json"}
    for name in shown:
        document = json.loads((repository / RESULTS / name).read_text(encoding="utf-8"))
        assert portrait_tables.table(document) in page, name
        if isinstance(document["rows"], list):
            assert portrait_tables.plot(document).startswith("<svg")
