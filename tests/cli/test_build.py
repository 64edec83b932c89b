"""`proteus-deploy build` from the command line to the table."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.cli import build
from proteus_deploy.cli import main as cli
from proteus_deploy.cli.main import Command
from proteus_deploy.cli.progress import Progress
from proteus_deploy.runtime import tensorrt_api

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.fixture
def bundle(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    commands: dict[str, Command] = {"build": build}
    monkeypatch.setattr(cli, "load_commands", lambda: commands)
    monkeypatch.setattr(tensorrt_api, "current_gpu", lambda index=0: None)
    monkeypatch.setenv("PROTEUS_DEPLOY_CACHE", str(tmp_path / "cache"))
    made = runpy.run_path(str(repository / "tests/export/conftest.py"))["make_bundle"](tmp_path / "bundle")
    assert isinstance(made, Bundle)
    return made


def test_table_and_progress(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", str(bundle.folder), "--target", "sm89", "--target", "sm120"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split() == ["graph", "target", "MiB", "seconds", "status"]
    assert sum(line.endswith("built, not run") for line in lines) == 6
    assert re.search(r"^first +sm89 +0\.\d +\d+\.\d +built, not run$", output.out, re.MULTILINE)
    assert lines[-2:] == [f"wrote {bundle.folder}/engines/sm89", f"wrote {bundle.folder}/engines/sm120"]
    assert "building: started, 6 engines" in output.err
    assert "building: done, 6 engines" in output.err
    assert bundle.targets == ("sm120", "sm89")


def test_second_run_comes_from_the_cache(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(bundle.folder), "--target", "sm89", "--stage", "second"]
    assert cli.main(command) == 0
    assert len(list((tmp_path / "cache/engines").glob("*.plan"))) == 2
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("built, not run (from the cache)") == 2
    assert cli.main([*command, "--cache-dir", str(tmp_path / "mine")]) == 0
    assert "from the cache" not in capsys.readouterr().out
    assert len(list((tmp_path / "mine").glob("*.plan"))) == 2


def test_json_document(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "build",
        str(bundle.folder),
        "--target",
        "sm86",
        "--no-cache",
        "--json",
        "--optimization-level",
        "1",
    ]
    assert cli.main(command) == 0
    document = json.loads(capsys.readouterr().out)
    engines = document["targets"]["sm86"]
    assert engines["options"]["optimization_level"] == 1
    assert engines["graphs"]["first"]["status"] == "built, not run"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "sm90"], "--flavour tensorrt"),
        (["--target", "sm89", "--target", "sm1"], "no target 'sm1'"),
        (["--target", "current"], "needs a CUDA device"),
        (["--target", "sm89", "--refit"], "can't make engines with --refit"),
        (["--target", "sm89", "--strip-weights"], "can't make engines with --strip-weights"),
        (["--target", "sm89", "--stage", "third"], "no stage 'third'"),
        (["--target", "sm89", "--optimization-level", "9"], "optimization level 9"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_built(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["build", str(bundle.folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (bundle.folder / "engines").exists()


def test_altered_bundle_is_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    with bundle.onnx_file("first").open("ab") as stream:
        stream.write(b"x")
    assert cli.main(["build", str(bundle.folder), "--target", "sm89"]) == 2
    assert "first.onnx has" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["between engines", "write", "monitor"])
def test_interrupt_ends_the_build(
    bundle: Bundle, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Wherever Ctrl-C comes, also in a callback under TensorRT's C++ code."""
    started: list[str] = []
    real, advance = tensorrt_api._new_writer, Progress.advance

    def note(self: Progress, n: int = 1, text: str | None = None) -> None:
        if n == 0 and text is not None:
            started.append(text)
        if n == 1 and text is not None and where == "between engines":
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, n, text)

    class Interrupting:
        """A stream whose first write meets Ctrl-C."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream
            self.calm = False

        def write(self, data: bytes) -> int:
            if not self.calm:
                self.calm = True
                os.kill(os.getpid(), signal.SIGINT)
            return int(self.stream.write(data))

    def new_monitor(module: Any, log: Any, cancel: Any) -> Any:
        monitor = real_monitor(module, log, cancel)
        os.kill(os.getpid(), signal.SIGINT)
        return monitor

    real_monitor = tensorrt_api._new_monitor
    monkeypatch.setattr(Progress, "advance", note)
    if where == "write":
        monkeypatch.setattr(
            tensorrt_api, "_new_writer", lambda module, log, stream: real(module, log, Interrupting(stream))
        )
    elif where == "monitor":
        monkeypatch.setattr(tensorrt_api, "_new_monitor", new_monitor)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["build", str(bundle.folder), "--target", "sm89", "--no-cache"]) == cli.EXIT_INTERRUPTED
    printed = capfd.readouterr().err
    assert printed.count("stopping…\n") == 1
    assert printed.endswith("error: interrupted\n")
    assert started == ["first for sm89"]
    assert list((bundle.folder / "engines").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_target_is_required(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["build", str(bundle.folder)])
    assert stopped.value.code == 2
    assert "--target" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["md", "json"])
def test_engine_report_is_written(
    bundle: Bundle, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"report.{suffix}"
    command = ["build", str(bundle.folder), "--target", "sm89", "--target", "sm120", "--report", str(file)]
    assert cli.main(command) == 0
    text = file.read_text()
    if suffix == "md":
        assert "## first for sm120" in text
        assert "as handed to the builder, not as built" in text
        assert "| w | matrix multiply | fp32 | not known |" in text
        return
    graphs = json.loads(text)["targets"]["sm89"]["graphs"]
    assert next(row["name"] for row in graphs["first"]["layers"]) == "node_product"
    assert bundle.engines("sm89").graphs["first"]["report"] == graphs["first"]


def test_report_survives_the_cache(bundle: Bundle) -> None:
    reports = []
    for _ in range(2):
        assert cli.main(["build", str(bundle.folder), "--target", "sm89", "--stage", "first"]) == 0
        reports.append(bundle.engines("sm89").graphs["first"]["report"])
    assert reports[0] == reports[1]
    assert bundle.engines("sm89").graphs["first"]["cached"]


def test_gate_fails_with_the_names_of_the_layers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from proteus_deploy.export.engine_report import report_network

    finding = {
        "code": "unfused-attention",
        "text": "attention a can't be fused",
        "layers": ["a"],
        "share": 0.5,
    }
    monkeypatch.setattr(
        "proteus_deploy.export.tensorrt_engine.report_network",
        lambda *given: {**report_network(*given), "findings": [finding]},
    )
    command = ["build", str(bundle.folder), "--target", "sm89", "--stage", "first", "--no-cache"]
    assert cli.main([*command, "--fail-on", "unfolded-qdq"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--fail-on", "unfolded-qdq", "--fail-on", "unfused-attention"]) == 1
    error = capsys.readouterr().err
    assert "error: sm89, first: unfused-attention: attention a can't be fused" in error
    assert bundle.targets == ("sm89",), "the engines are there: what to do with them is the caller's"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fail-on", "reformat"], "--fail-on reformat can't be decided here"),
        (["--report", "report.txt"], "report.txt ends in neither .md nor .json"),
    ],
)
def test_report_that_cannot_be_had_is_refused_before_the_build(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["build", str(bundle.folder), "--target", "sm89", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert bundle.targets == ()


def test_weight_streaming_is_recorded(bundle: Bundle) -> None:
    """That the flag changes the engine can't be seen without a GPU; that it is set and kept can."""
    command = ["build", str(bundle.folder), "--target", "sm89", "--stage", "first", "--weight-streaming"]
    assert cli.main(command) == 0
    assert bundle.engines("sm89").document["options"]["weight_streaming"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--target", "aotinductor-cpu"],
            "aotinductor-cpu compiles the checkpoint's networks; add --checkpoint",
        ),
        (["--target", "sm89", "--checkpoint", "x"], "--checkpoint is read for --target aotinductor-cpu only"),
        (
            ["--target", "aotinductor-cpu", "--checkpoint", "x", "--strip-weights"],
            "--strip-weights is for TensorRT engines; leave it out",
        ),
        (["--target", "aotinductor-cpu", "--checkpoint", "absent"], "absent"),
        (
            ["--target", "aotinductor-cpu", "--checkpoint", "x", "--report", "x.md"],
            "--report is for TensorRT engines; leave it out",
        ),
    ],
    ids=["no checkpoint", "checkpoint for an engine", "flag of engines", "absent checkpoint", "report"],
)
def test_flags_that_no_target_follows(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["build", str(bundle.folder), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert bundle.targets == ()


def test_engines_and_packages_in_one_command(
    bundle: Bundle, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from proteus_deploy.export import aot_package

    asked: list[tuple[str, Any]] = []

    def packages(bundle: Bundle, checkpoint: Any, **options: Any) -> Any:
        asked.append((checkpoint.folder.name, options["stages"]))
        options["progress"]("first", None)
        options["progress"]("first", {})
        return bundle.engines("sm89")

    monkeypatch.setattr(aot_package, "build_packages", packages)
    targets = ["--target", "aotinductor-cpu", "--target", "sm89", "--checkpoint", str(tiny_checkpoint)]
    assert cli.main(["build", str(bundle.folder), *targets, "--stage", "first"]) == 0
    assert asked == [(tiny_checkpoint.name, ["first"])]
    assert "building: done, 2 engines" in capsys.readouterr().err


def test_inspect_shows_the_reports(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from proteus_deploy.cli import inspect

    commands: dict[str, Command] = {"build": build, "inspect": inspect}
    monkeypatch.setattr(cli, "load_commands", lambda: commands)
    assert cli.main(["build", str(bundle.folder), "--target", "sm89"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(bundle.folder), "--engines"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^first +sm89 +fp32 100% +none +as handed to the builder", printed, re.MULTILINE)
    assert cli.main(["inspect", str(bundle.folder), "--engines", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["targets"]["sm89"]["graphs"]) == {"first", "second_start", "second_next"}
