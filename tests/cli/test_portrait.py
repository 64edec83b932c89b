"""`portrait` on a random portrait checkpoint: files, settings, what is printed, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proteus_deploy.cli import portrait as command
from proteus_deploy.cli.main import main
from proteus_deploy.cli.progress import PhaseProgress
from proteus_deploy.portrait.cache import make_cache
from proteus_deploy.portrait.opening import open_painter
from proteus_deploy.portrait.plan import DENSE, POLICIES, CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.provenance import GENERATED
from proteus_deploy.tiny.portrait_checkpoint import RANDOM_GPT, write_random_portrait

PROMPT = "a woman with red hair"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_portrait(tmp_path_factory.mktemp("portrait") / "model")


@pytest.fixture
def draw(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """draw(*words) -> the JSON document of a run that wrote out.png."""

    def run(*words: str) -> Any:
        assert main(["portrait", str(model), "--output", str(tmp_path / "out.png"), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def _pixels(file: str | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(file) as image:
        return np.asarray(image)


def test_a_portrait(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new folder" / "out.png"
    assert main(["portrait", str(model), "--prompt", PROMPT, "--out", str(file), "--seed", "3"]) == 0
    printed = capsys.readouterr()
    row = printed.out.splitlines()[2]
    assert re.fullmatch(r"\S.*out\.png  16x16 +3 +64  adsa, 0\.7  \d+ of \d+ +0\.\d+ +\d+\.\d", row)
    assert "portrait: started, 64 tokens" in printed.err
    painter = open_painter(model)
    assert np.array_equal(_pixels(file), painter.draw([PROMPT], seeds=[3])[0])
    with Image.open(file) as image:
        texts = dict(image.text)  # type: ignore[attr-defined]
    comment = json.loads(texts["Comment"])
    assert (comment["prompt"], comment["seed"]) == (PROMPT, 3)
    assert GENERATED in texts["XML:com.adobe.xmp"]


def test_several_portraits_are_those_of_single_ones(draw: Callable[..., Any], tmp_path: Path) -> None:
    words = ["--prompt", PROMPT, "--prompt", "an old man", "--num-images", "2", "--seed", "5"]
    rows = draw(*words)["portraits"]
    assert [Path(row["output"]).name for row in rows] == [f"out-{number}.png" for number in range(4)]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (PROMPT, 5), (PROMPT, 6), ("an old man", 7), ("an old man", 8),
    ]  # fmt: skip
    assert not (tmp_path / "out.png").exists()
    alone = draw("--prompt", "an old man", "--seed", "7")["portraits"][0]
    assert np.array_equal(_pixels(alone["output"]), _pixels(rows[2]["output"]))
    assert not np.array_equal(_pixels(rows[0]["output"]), _pixels(rows[1]["output"]))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_said_of_the_cache_is_what_was_made(
    draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    made: list[Any] = []
    real = make_cache

    def make(*arguments: Any, **named: Any) -> Any:
        made.append(real(*arguments, **named))
        return made[-1]

    monkeypatch.setattr("proteus_deploy.portrait.decoding.make_cache", make)
    smaller = [] if policy == "dense" else ["--budget", "0.6", "--scope", "head"]
    row = draw("--prompt", PROMPT, "--cache-policy", policy, *smaller)["portraits"][0]
    (cache,) = made
    assert cache.plan.policy == policy
    assert (row["slots"], row["cache_bytes"]) == (cache.plan.slots, cache.bytes)
    assert row["positions"] == cache.seen + 1, "the last token needs no place"
    assert (row["slots"] == row["positions"]) == (policy == "dense")


@pytest.mark.slow
def test_a_portrait_bundle(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command on the exported model, whose cache is fixed."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from proteus_deploy.export.portrait_onnx import export_portrait
    from proteus_deploy.portrait.checkpoint import PortraitCheckpoint

    bundle = export_portrait(PortraitCheckpoint.open(model), tmp_path / "bundle")
    words = ["portrait", str(bundle.folder), "--prompt", PROMPT, "--output", str(tmp_path / "out.png")]
    assert main([*words, "--seed", "3", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["portraits"][0]
    assert np.array_equal(_pixels(row["output"]), open_painter(bundle.folder).draw([PROMPT], seeds=[3])[0])
    held = [
        spec for spec in bundle.table.graph("decoder").inputs if spec.name.startswith(("keys_", "values_"))
    ]
    assert row["cache_bytes"] == sum(4 * int(np.prod(spec.shape({"B": 1}))) for spec in held)
    assert (row["slots"], row["positions"]) == (bundle.plan.slots, RANDOM_GPT.length)
    assert main([*words, "--budget", "0.6"]) == 2
    assert "export the checkpoint again with that cache" in capsys.readouterr().err
    assert main([*words, "--device", "gpu"]) == 2
    assert "ONNX Runtime device is 'gpu'" in capsys.readouterr().err


def test_flags_reach_the_model_and_what_is_left_out_is_its_own(
    draw: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    painter = open_painter(model)

    class Spy:
        sampling, cache = painter.sampling, painter.cache

        def draw(self, captions: list[str], **named: Any) -> Any:
            seen.update(named)
            return painter.draw(captions, **named)

    monkeypatch.setattr("proteus_deploy.portrait.opening.open_painter", lambda *_, **__: Spy())
    document = draw("--prompt", PROMPT)
    assert (seen["sampling"], seen["cache"], seen["seeds"]) == (painter.sampling, painter.cache, [0])
    assert document["portraits"][0]["slots"] is None, "this one doesn't say"
    words = [
        "--guidance-scale",
        "1",
        "--temperature",
        "0.9",
        "--top-k",
        "50",
        "--top-p",
        "0.8",
        "--seed",
        "4",
    ]
    words += ["--budget", "0.8", "--prefix", "2", "--window", "9", "--cadence", "3", "--scope", "head"]
    draw("--prompt", PROMPT, *words)
    assert seen["sampling"] == Sampling(1.0, 0.9, 50, 0.8, seed=4)
    assert seen["cache"] == CacheSettings("adsa", 0.8, prefix=2, window=9, cadence=3, scope="head")
    Spy.cache = DENSE
    draw("--prompt", PROMPT, "--cache-policy", "uniform")
    assert seen["cache"] == CacheSettings("uniform"), "a budget of everything would leave nothing to choose"


def test_a_random_seed_can_be_used_again(draw: Callable[..., Any]) -> None:
    first = draw("--prompt", PROMPT, "--seed", "random")["portraits"][0]
    pixels = _pixels(first["output"])
    again = draw("--prompt", PROMPT, "--seed", str(first["seed"]))["portraits"][0]
    assert np.array_equal(_pixels(again["output"]), pixels)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "x.jpg"], r"--output is x\.jpg; portraits are written as \.png: try x\.png"),
        (["--output", "absent"], r"--output is absent; .*try absent\.png"),
        (["--num-images", "0"], "--num-images is 0; choose at least 1"),
        (["--prompt", "  "], "a caption is '  '"),
        (["--prompt", "\udcff"], "half a character"),
        (["--prompt", "x" * 2001], "a caption has 2001 characters; use at most 2000"),
        (["--seed", "-1"], "seed is -1; it must be 0 to 2\\^63 - 1"),
        (["--guidance-scale", "0.5"], r"guidance_scale is 0\.5; choose 1 \(none\) or more"),
        (["--top-p", "0"], "top_p is 0.0; choose a share"),
        (["--budget", "2"], "budget is 2.0; choose a share"),
        (["--budget", "0.1"], "slots can't hold a prefix"),
        (["--cache-policy", "dense", "--budget", "0.5"], "--budget is 0.5, and --cache-policy is dense"),
        (["--device", "gpu"], "device is 'gpu'"),
    ],
    ids=lambda value: ascii(" ".join(value))[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_with_the_way_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    words = ["portrait", str(model), "--prompt", PROMPT, "--output", str(tmp_path / "out.png"), *more]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert "started" not in printed
    assert list(tmp_path.iterdir()) == []


def test_no_portrait_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["portrait", str(tmp_path), "--prompt", PROMPT, "--output", str(tmp_path / "out.png")]
    assert main(words) == 2
    assert "has no portrait.json" in capsys.readouterr().err


def test_an_output_that_can_not_be_written_is_known_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    words = ["portrait", str(model), "--prompt", PROMPT, "--output", str(tmp_path / "file" / "out.png")]
    assert main(words) == 2
    assert "can't write" in capsys.readouterr().err


def test_a_model_with_a_dense_cache_takes_no_budget(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((model / "portrait.json").read_text())
    (tmp_path / "model").mkdir()
    for name in ("gpt", "vq"):
        (tmp_path / "model" / f"{name}.safetensors").symlink_to(model / f"{name}.safetensors")
    document["cache"] = {"policy": "dense", "budget": 1.0}
    (tmp_path / "model" / "portrait.json").write_text(json.dumps(document))
    words = ["portrait", str(tmp_path / "model"), "--prompt", PROMPT, "--output", str(tmp_path / "out.png")]
    assert main([*words, "--budget", "0.5"]) == 2
    assert "this model's cache is dense, which keeps everything" in capsys.readouterr().err
    assert main([*words, "--budget", "0.7", "--cache-policy", "adsa"]) == 0


def test_interrupt_stops_between_tokens(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished before stays."""
    seen: list[tuple[str, int]] = []

    class Interrupting(PhaseProgress):
        def __call__(self, phase: str, done: int, total: int) -> None:
            seen.append((phase, done))
            if (phase, done) == ("portrait 2 of 2", 5):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command, "PhaseProgress", Interrupting)
    words = ["portrait", str(model), "--prompt", PROMPT, "--output", str(tmp_path / "out.png")]
    assert main([*words, "--num-images", "2"]) == 130
    assert seen[-2:] == [("portrait 2 of 2", 4), ("portrait 2 of 2", 5)]
    assert len(seen) == RANDOM_GPT.block_size + 5
    assert "interrupted" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out-0.png"]
