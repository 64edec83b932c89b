"""`bench` where nothing but the package itself is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from proteus_deploy.benchmarks.requirements import require_packages
from proteus_deploy.errors import BackendError

HIDDEN = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "triton",
    "insightface",
)
# To Python they then aren't there, whether they are imported or only looked for.
HIDE = f"""
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {HIDDEN!r}
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
from proteus_deploy.cli.main import main
raise SystemExit(main(sys.argv[1:]))
"""
CASES = {
    "exact:onnxruntime:fp32": 'onnxruntime is not installed; pip install "proteus-deploy[onnx]"',
    "exact:openvino:bf16": 'openvino is not installed; pip install "proteus-deploy[openvino]"',
    "exact:eager-triton:bf16": 'triton is not installed; pip install "proteus-deploy[triton]"',
    "exact:tensorrt:bf16": 'tensorrt is not installed; pip install "proteus-deploy[tensorrt]"',
    "exact:compiled:bf16": "torch.compile needs a C++ compiler on a CPU, and no-such-compiler isn't here",
}


@pytest.mark.slow
def test_it_completes_and_says_what_is_missing(parity: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = ["bench", "--checkpoint", str(parity / "checkpoint"), "--steps", "1", "--rounds", "1"]
    words += ["--no-memory", "--end-to-end", "--baseline", "none", "--candidate", "exact:eager:fp32"]
    words += [word for case in CASES for word in ("--candidate", case)]
    words += [
        "--json",
        str(file),
        "--report",
        str(tmp_path / "page.html"),
        "--plots",
        str(tmp_path / "plots"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", HIDE, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CXX": "no-such-compiler"},
    )
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(file.read_text())["rows"]}
    eager = rows.pop("exact:eager:fp32")
    assert eager["status"] == "ok"
    assert eager["request_ms"]["n"] == 1
    assert set(rows) == set(CASES)
    for case, words_of_it in CASES.items():
        assert rows[case]["status"] == "not measured"
        assert rows[case]["reason"].startswith(words_of_it)
        assert words_of_it in done.stdout
    assert (tmp_path / "plots" / "waterfall.png").is_file()


def test_what_is_there_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # any program will do
    for backend in ("eager", "compiled"):
        require_packages(backend, "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    require_packages("compiled", "cuda")  # there Triton compiles
    with pytest.raises(BackendError, match="apt-get install g\\+\\+, or name it in CXX"):
        require_packages("compiled", "cpu")
