"""`proteus-deploy evaluate`: tables, documents, page, exit codes; measures that need no networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_deploy.cli.evaluate_cases import cases_from_file, read_mask, request_facts
from proteus_deploy.cli.main import main
from proteus_deploy.errors import InputError
from proteus_deploy.video import Video

MakeVideo = Callable[..., Path]
WriteJson = Callable[[Any], Path]


@pytest.fixture
def video(tmp_path: Path) -> MakeVideo:
    """video(name, noise=, seed=) -> an mp4 of five frames of 48 x 32, more noise making it worse."""

    def make(name: str = "clip.mp4", *, noise: float = 0.0, seed: int = 1, steps: int = 4) -> Path:
        ramp = torch.linspace(0.2, 0.8, 48).expand(1, 5, 3, 32, 48)
        grain = torch.randn(ramp.shape, generator=torch.Generator().manual_seed(seed))
        request = {"prompt": "a person waves", "num_inference_steps": steps, "photo": None}
        path = tmp_path / name
        Video((ramp + noise * grain).clamp(0, 1), 8, {"request": request, "seed": seed}).save(path)
        return path

    return make


@pytest.fixture
def cases(tmp_path: Path, video: MakeVideo) -> Path:
    """Two persons, two seeds each, with references."""
    video("ref/clip.mp4")
    entries = []
    for place, person in enumerate(("ann", "bob")):
        for seed in (1, 2):
            name = f"{person}/{seed}.mp4"
            video(name, noise=0.02 + 0.02 * place, seed=seed, steps=4 * seed)
            entries.append({"video": name, "person": person, "reference": "ref/clip.mp4"})
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(entries))
    return file


@pytest.fixture
def budget(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "budget.toml"
        file.write_text(f'[[bound]]\nmetric = "psnr"\n{text}\n')
        return file

    return write


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


def test_table_and_document(video: MakeVideo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [video(noise=0.05), "--reference", video("ref.mp4"), "--json", tmp_path / "new" / "run.json"]
    assert evaluate(*words) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["psnr", "ssim"]
    assert "face_sim_arc" in lines[4]
    assert lines[4].startswith("not measured at all: ")
    assert "evaluating: done, 1 video" in output.err
    document = json.loads((tmp_path / "new" / "run.json").read_text())
    (entry,) = document["videos"]
    assert (entry["prompt"], entry["seed"]) == ("a person waves", 1)
    assert entry["settings"] == {"num_inference_steps": 4.0}
    assert entry["reasons"]["face_sim_arc"] == "no photo was given"
    assert 20 < entry["values"]["psnr"] < 40
    assert set(document) >= {"machine", "versions", "commit", "settings", "date"}


def test_chosen_metrics(video: MakeVideo, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(video(), "--reference", video("ref.mp4"), "--metrics", "ssim") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["ssim", "1"]
    assert "psnr" in lines[3]


def test_cases_are_clustered_and_reported(cases: Path, tmp_path: Path) -> None:
    page, file = tmp_path / "page.html", tmp_path / "run.json"
    assert evaluate("--cases", cases, "--report", page, "--json", file) == 0
    document = json.loads(file.read_text())
    assert [video["case"] for video in document["videos"]] == ["ann/1", "ann/2", "bob/1", "bob/2"]
    assert [video["seed"] for video in document["videos"]] == [1, 2, 1, 2]
    estimate = document["metrics"][0]["estimate"]
    assert (estimate["resampled"], estimate["groups"], estimate["n"]) == ("person", 2, 4)
    text = page.read_text()
    assert text.count("data:image/png") == 2
    assert "The first video of each person." in text
    assert "psnr by num_inference_steps" in text


def test_budget(cases: Path, budget: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--cases", cases, "--budget", budget("min = 10")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    assert evaluate("--cases", cases, "--budget", budget('min = 33\nstatistic = "worst"')) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("FAILED")
    assert " (bob/" in lines[-2]


def test_files_are_written_when_the_gate_fails(
    cases: Path, budget: Callable[[str], Path], tmp_path: Path
) -> None:
    files = ["--json", tmp_path / "run.json", "--report", tmp_path / "page.html"]
    assert evaluate("--cases", cases, "--budget", budget("min = 90"), *files) == 1
    assert json.loads((tmp_path / "run.json").read_text())["gate"]["passed"] is False
    assert "✗ failed" in (tmp_path / "page.html").read_text()


def test_baseline(
    video: MakeVideo, budget: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file name in two folders is the same case; the worse run drops."""
    reference = ["--reference", video("ref.mp4"), "--metrics", "psnr"]
    good, bad = video("old/a.mp4", noise=0.02), video("new/a.mp4", noise=0.08)
    assert evaluate(good, *reference, "--json", tmp_path / "old.json") == 0
    words = [bad, *reference, "--baseline", tmp_path / "old.json", "--report", tmp_path / "page.html"]
    assert evaluate(*words, "--budget", budget("max_drop = 30")) == 0
    capsys.readouterr()
    assert evaluate(*words, "--budget", budget("max_drop = 3")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "change" in lines[0]
    assert "is above 3" in lines[-2]
    page = (tmp_path / "page.html").read_text()
    assert "frames of the baseline, frames of this run" in page
    good.unlink()
    assert evaluate(*words) == 0
    assert "videos were not found for a." in (tmp_path / "page.html").read_text()


def test_baseline_of_other_cases_fails(
    video: MakeVideo, budget: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = ["--reference", video("ref.mp4"), "--metrics", "psnr"]
    assert evaluate(video("a.mp4"), *reference, "--json", tmp_path / "old.json") == 0
    words = ["--baseline", tmp_path / "old.json", "--budget", budget("max_drop = 3")]
    assert evaluate(video("b.mp4"), *reference, *words) == 1
    assert "the baseline has no video b" in capsys.readouterr().out


def test_motion_takes_a_mask(video: MakeVideo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    from PIL import Image

    mask = np.zeros((32, 48), np.uint8)
    mask[:, :24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert evaluate(video(), "--person-mask", tmp_path / "mask.png") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert names == ["motion_person", "motion_background"]


def test_mask_of_another_size(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((8, 16), 200, np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", (3, 8, 16)).shape == (3, 8, 16)
    assert read_mask(tmp_path / "mask.png", (3, 8, 16)).all()
    with pytest.raises(InputError, match=r"has the shape \[1, 8, 16\] and the video \[3, 8, 8\]"):
        read_mask(tmp_path / "mask.png", (3, 8, 8))


def test_request_facts_are_taken_with_care() -> None:
    facts = {"request": {"prompt": "p", "guidance_scale": 6, "num_frames": True}, "seed": 0}
    assert request_facts(facts) == ("p", 0, {"guidance_scale": 6.0})
    for other in ({}, {"request": 3, "seed": 1}, {"request": {"prompt": 5, "seed": "x"}}):
        assert request_facts(other) == (None, None, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no video to measure"),
        (["absent.mp4"], "absent.mp4 is not a file; it is the video of 'absent'"),
        (["VIDEO", "--photo", "absent.png"], "it is the photo of"),
        (["VIDEO"], "nothing could be measured"),
        (["VIDEO", "--metrics", "pnsr"], "--metrics is 'pnsr'; there are face_sim_arc"),
        (["VIDEO", "--metrics", ","], "there are face_sim_arc"),
        (["VIDEO", "--metrics", "psnr"], "psnr can't be measured: no reference video was given"),
        (["VIDEO", "--reference", "VIDEO", "--budget", "absent.toml"], "not readable TOML"),
        (["VIDEO", "--reference", "VIDEO", "--baseline", "absent.json"], "not readable JSON"),
        (["VIDEO", "--encoders", "absent"], "absent is not a folder"),
        (["VIDEO", "--cases", "VIDEO"], "leave out VIDEO"),
        (["VIDEO", "VIDEO"], "are both called 'clip'"),
        (["VIDEO", "--json", "."], "is a folder"),
    ],
)
def test_wrong_input(
    video: MakeVideo, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    clip = str(video())
    assert evaluate(*[clip if word == "VIDEO" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_drop_without_baseline_is_refused_before_the_work(
    cases: Path, budget: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--cases", cases, "--budget", budget("max_drop = 3")) == 2
    error = capsys.readouterr().err
    assert "none was given" in error
    assert "evaluating" not in error


def test_other_size_of_reference_names_the_video(
    video: MakeVideo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Video(torch.zeros(1, 5, 3, 16, 16), 8).save(tmp_path / "small.mp4")
    clip = video()
    assert evaluate(clip, "--reference", tmp_path / "small.mp4") == 2
    assert f"error: {clip}: frames are [5, 32, 48, 3]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "must be a JSON list"),
        ([], "must be a JSON list"),
        ([3], "case 1 is 3"),
        ([{"photo": "a.png"}], "case 1 names no video"),
        ([{"video": "a.mp4", "sead": 1}], "unknown key 'sead'"),
        ([{"video": 3}], "video is 3; it is text"),
        ([{"video": "a.mp4", "seed": "1"}], "seed is '1'"),
        ([{"video": "a.mp4", "seed": True}], "seed is True"),
        ([{"video": "a.mp4", "person": ""}], "person is ''"),
        ([{"video": "b.mp4"}], "b.mp4 is not a file"),
        ([{"video": "a.mp4"}, {"video": "a.mp4"}], "both called 'a'"),
        ([{"video": "a.mp4", "name": "x", "person": "p"}, {"video": "a.mp4"}], "1 of 2 cases name no person"),
    ],
)
def test_wrong_cases(tmp_path: Path, document: object, message: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "cases.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        cases_from_file(tmp_path / "cases.json")


def test_cases_are_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "runs" / name).touch()
    document = [{"video": "a.mp4", "name": "first"}, {"video": "b.mp4"}]
    (tmp_path / "runs" / "cases.json").write_text(json.dumps(document))
    cases = cases_from_file(tmp_path / "runs" / "cases.json")
    assert [case.name for case in cases] == ["first", "b"]
    assert cases[0].video == tmp_path / "runs" / "a.mp4"
