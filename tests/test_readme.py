"""What the documents say is run: README blocks are executed, links and images exist.

A block preceded by the line `<!-- no-test -->` is left alone. Blocks run in the order of the page, in one
temporary folder: python blocks in one namespace, `proteus-deploy` lines through the installed program. `make`
lines are checked to name a target; `make demo` then runs what its recipe runs, since later blocks use its
files. `pip`, `git` and `cd` lines are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BLOCK = re.compile(
    r"(?P<skip><!-- no-test -->\n+)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(
    r"!?\[[^\]]*\]\((?P<markdown>[^)\s]+)[^)]*\)|<(?:img|a)\s[^>]*(?:src|href)=\"(?P<html>[^\"]+)\""
)
NOT_RUN = {"pip", "git", "cd"}
SHELLS = {"sh", "bash", "shell", "console"}
COMMAND_LIMIT_S = 1200


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the line of the page where the text begins."""

    language: str
    body: str
    line: int


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page that are to be tested, in order."""
    return [
        Block(match["language"], match["body"], page.count("\n", 0, match.start("body")) + 1)
        for match in BLOCK.finditer(page)
        if not match["skip"]
    ]


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, continued lines joined; in a console block only what follows `$ `."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def targets_of(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", makefile, re.MULTILINE))


def program_words(recipe: str) -> list[str]:
    """Of the one line of a recipe, as make prints it, that calls our program: what follows its name."""
    # The others, which set the environment up where it is out of date, may hold quotes over several lines.
    (line,) = [line for line in recipe.splitlines() if re.match(r"\S*/proteus-deploy\s", line)]
    return shlex.split(line)[1:]


def _run_program(words: list[str], folder: Path, where: str) -> None:
    program = str(Path(sys.executable).parent / "proteus-deploy")
    done = subprocess.run(
        [program, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=COMMAND_LIMIT_S
    )
    assert done.returncode == 0, f"{where}: {shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def _run_command(command: str, folder: Path, repository: Path, where: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "proteus-deploy":
        _run_program(words[1:], folder, where)
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        unknown = set(targets) - targets_of((repository / "Makefile").read_text(encoding="utf-8"))
        assert not unknown, f"{where}: the Makefile has no target {sorted(unknown)}"
        if targets == ["demo"]:
            dry = [*words, "--dry-run"]
            recipe = subprocess.run(dry, cwd=repository, capture_output=True, text=True, check=True).stdout
            _run_program(program_words(recipe), folder, where)
    else:
        assert words[0] in NOT_RUN, f"{where}: this test doesn't know what to do with {command!r}"


@pytest.mark.slow
def test_readme_blocks_run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    blocks = blocks_of((repository / "README.md").read_text(encoding="utf-8"))
    assert {block.language for block in blocks} <= SHELLS | {"python", "json", "text"}
    for block in blocks:
        where = f"README.md:{block.line}"
        if block.language == "python":
            # Blank lines in front make the line numbers of a traceback those of the page.
            code = compile("\n" * (block.line - 1) + block.body, "README.md", "exec")
            exec(code, namespace)  # noqa: S102 - running the page is the point of this test
        elif block.language in SHELLS:
            for command in commands_of(block):
                _run_command(command, tmp_path, repository, where)


def test_readme_shows_code_early_and_stays_short(repository: Path) -> None:
    page = (repository / "README.md").read_text(encoding="utf-8")
    first = {block.language: block.line for block in reversed(blocks_of(page))}
    assert first["sh"] < 25
    assert first["python"] < 25
    assert len(page.splitlines()) < 150


def test_readme_names_every_command(repository: Path) -> None:
    from proteus_deploy.cli.main import COMMAND_MODULES

    page = (repository / "README.md").read_text(encoding="utf-8")
    missing = [name for name in COMMAND_MODULES if not re.search(rf"^\| \[?`{name}\b", page, re.MULTILINE)]
    assert missing == []


def test_pages_have_no_gaps_to_fill(repository: Path) -> None:
    gaps = [
        f"{page.relative_to(repository)}: {gap}"
        for page in _pages(repository)
        for gap in re.findall(r"@[A-Z]+@", page.read_text(encoding="utf-8"))
    ]
    assert gaps == []


def _pages(repository: Path) -> list[Path]:
    pages = []
    for base, folders, names in os.walk(repository):
        kept = [
            name for name in folders if not name.startswith(".") and name not in {"build", "demo", "dist"}
        ]
        folders[:] = sorted(kept)
        pages += [Path(base) / name for name in sorted(names) if name.endswith(".md")]
    return pages


def test_links_and_images_exist(repository: Path) -> None:
    broken = []
    for page in _pages(repository):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for match in LINK.finditer(text):
            target = match["markdown"] or match["html"]
            if re.match(r"[a-z][a-z+.-]*:", target) or target.startswith("#"):
                continue
            if not (page.parent / target.partition("#")[0]).exists():
                broken.append(f"{page.relative_to(repository)}: {target}")
    assert broken == []


def test_block_reader() -> None:
    page = (
        "a\n\n```sh\nmake x\n```\n\n<!-- no-test -->\n```python\n1/0\n```\n\n"
        "```console\n$ ls \\\n  -l\nout\n```\n"
    )
    blocks = blocks_of(page)
    assert [(block.language, block.line) for block in blocks] == [("sh", 4), ("console", 13)]
    assert [" ".join(command.split()) for command in commands_of(blocks[1])] == ["ls -l"]


def test_makefile_reader() -> None:
    assert targets_of("A := 1\n.PHONY: demo\ndemo: $(STAMP)\n\t$(BIN)/run demo\n\ntest: check\n") == {
        "demo",
        "test",
    }
    printed = "python -c 'a \\\n\tb'\npip install x\n.venv/bin/proteus-deploy demo --output-dir demo\n"
    assert program_words(printed) == ["demo", "--output-dir", "demo"]
