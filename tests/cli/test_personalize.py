"""`personalize` on the tiny model: an adapter, a report, previews; going on; refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from proteus_deploy.adapters import TimestepGate, read_adapter
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli import personalize as command
from proteus_deploy.cli.main import main
from proteus_deploy.model.low_rank import PROJECTIONS
from proteus_deploy.personalize.settings import RECOGNISERS, PersonalizeSettings
from proteus_deploy.tiny.trained import ENCODERS, MODEL
from proteus_deploy.training.avatars import make_photo

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

PROMPTS = "{person} nods\n{person} blinks\n{person} stands still\n"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    photo, prompts = tmp_path / "photo.png", tmp_path / "prompts.txt"
    Image.fromarray(make_photo(33, 0).image).save(photo)
    prompts.write_text(PROMPTS, encoding="utf-8")
    words = ["personalize", "--checkpoint", str(MODEL), "--image", str(photo), "--person", "an older man"]
    words += ["--encoders", str(ENCODERS), "--prompts", str(prompts), "--output-dir", str(tmp_path / "run")]
    return [*words, "--num-inference-steps", "4", "--gate", "0-300", "--rank", "4"]


SHORT = ["--steps", "3", "--evaluate-every", "3", "--videos", "1", "--held-out", "1"]
SHORT += ["--guidance-scale", "1", "--learning-rate", "2e-3"]


@pytest.mark.slow
def test_an_adapter(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text("[personalize]\nfaces = 8\nmotion_loss = 1.0\n", encoding="utf-8")
    words += [*SHORT, "--settings", str(settings), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["best"]["step"] == 3
    assert document["best"]["reward"] > document["frozen"]["reward"]
    assert document["settings"]["faces"] == 8
    assert document["machine"]
    run = tmp_path / "run"
    adapter = read_adapter(run / "adapter.safetensors")
    assert adapter.hash == document["adapter"]["hash"]
    assert (adapter.gate, adapter.rank) == (TimestepGate(0, 300), 4)
    assert adapter.base == Checkpoint.open(MODEL).hash
    assert adapter.person is not None
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "all steps" not in page  # it is said in words
    assert "every step was taken" in page
    assert page.count("<svg") == 4
    assert sorted(file.name for file in (run / "previews").iterdir()) == ["step-00000.png", "step-00003.png"]
    # Finished: the same command says the same, from what is there.
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["best"] == document["best"]
    assert read_adapter(run / "adapter.safetensors").hash == adapter.hash
    # Another photo isn't gone on with.
    Image.fromarray(make_photo(34, 0).image).save(tmp_path / "photo.png")
    heads = sorted((run / "heads").iterdir())
    assert main(words) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert sorted((run / "heads").iterdir()) == heads, "refused before any work"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--gate", "0:300"], "--gate is '0:300'; write LOW-HIGH, as 0-250"),
        (["--gate", "300-300"], "the gate is 300 to 300"),
        (["--steps", "0"], "steps is 0; choose at least 1"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--image", "absent.png"], "absent.png is not a file; --image takes the photo of the person"),
        (["--prompts", "absent.txt"], "absent.txt can't be read as a list of prompts"),
        (["--encoders", "absent"], "absent is not a folder"),
        (["--projections", "to_x"], "projections is 'to_x'"),
        (["--device", "gpu"], "device is 'gpu'; PyTorch runs here on 'cpu', 'cuda' or 'cuda:N'"),
        (["--gradient-steps", "5"], "gradient_steps is 5; a video has 4 steps"),
        (["--gate", "600-800"], "so no gradient reaches the adapter; take more gradient_steps"),
        (["--gate", "0-100"], "none of the 4 timesteps lies in the gate 0 to 100"),
    ],
)
def test_wrong_input(
    words: list[str], more: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words + more) == 2
    assert named in capsys.readouterr().err


def test_checkpoint_or_bundle(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--bundle", str(MODEL)])
    assert "not allowed with argument" in capsys.readouterr().err


def test_help_says_the_defaults() -> None:
    """They are written by hand there: the record of settings would load torch for every command."""
    own = PersonalizeSettings()
    for name, (_, text) in command._FLAGS.items():
        said = re.search(r"\(([^)]*)\)$", text)
        assert said is not None, name
        value = getattr(own, name)
        if name in ("projections", "recognisers"):
            assert said[1] in ("all of them", "both")
            assert set(value.split(",")) == set(PROJECTIONS if name == "projections" else RECOGNISERS)
        else:
            assert float(said[1]) == value
