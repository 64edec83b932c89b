"""What `deploy/` says agrees with the code: flags, routes, folders, metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from proteus_deploy.cli.main import build_parser, load_commands
from proteus_deploy.serving import app, metrics


def _documents(repository: Path) -> list[dict[str, Any]]:
    files = sorted((repository / "deploy" / "kubernetes").glob("*.yaml"))
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def test_the_dashboard_asks_for_metrics_that_there_are(repository: Path) -> None:
    dashboard = json.loads((repository / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    named = set(re.findall(r'"(proteus_\w+)"', Path(metrics.__file__).read_text(encoding="utf-8")))
    assert len(named) > 12
    found = {name.removesuffix("_total") for name in re.findall(r"proteus_\w+", asked)}
    assert found <= named
    assert {"proteus_jobs", "proteus_wait_seconds", "proteus_stage_seconds"} <= found


def test_manifests_use_routes_and_flags_that_there_are(repository: Path) -> None:
    documents = {document["kind"]: document for document in _documents(repository)}
    assert set(documents) == {"StatefulSet", "Service", "ScaledObject"}
    pod = documents["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    routes = Path(app.__file__).read_text(encoding="utf-8")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in routes
    words = ["serve", "/bundle", "--host", "127.0.0.1", "--data-dir", "/data", *container["args"]]
    arguments = build_parser(load_commands()).parse_args(words)
    assert arguments.finish_seconds < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_copy_every_package_and_start_the_server(repository: Path, name: str) -> None:
    text = (repository / "deploy" / name).read_text(encoding="utf-8")
    copied = set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))
    assert copied == {"proteus_deploy", "export", "kernels", "serving", "benchmarks"}
    extras = re.findall(r"\[([\w,-]+)\]\"", text)[0].split(",")
    project = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{re.escape(extra)} = \[", project, re.MULTILINE) for extra in extras)
    entry = json.loads(re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)[0])
    assert entry[0] == "proteus-deploy"
    build_parser(load_commands()).parse_args(entry[1:])
