"""Engines kept between builds, under a key of everything that decides what they are.

An entry is `<key>.plan` and `<key>.json`, the latter written last and holding the plan's sha256. What is
incomplete or altered is thrown away and built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file, cache_folder, sha256_of, write_json

_LOG = logging.getLogger(__name__)
_VERSION = 3  # raise it when records change, so that old entries are not read


def default_folder() -> Path:
    """`engines` in the cache folder of the user (see `cache_folder`)."""
    return cache_folder("engines")


def cache_key(facts: Mapping[str, Any]) -> str:
    """sha256 of `facts`: the source's digest, graph, profile, target, package, version, options."""
    text = json.dumps({"cache": _VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class EngineCache:
    """A folder of engines; made when the first one is stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, key: str, destination: Path) -> dict[str, Any] | None:
        """Copy the engine of `key` to `destination`, return its record; None where there is no sound one."""
        plan, record_file = self.folder / f"{key}.plan", self.folder / f"{key}.json"
        if not record_file.is_file():
            return None
        try:
            entry = json.loads(record_file.read_text(encoding="utf-8"))
            record, expected = dict(entry["record"]), entry["sha256"]
            with atomic_file(destination) as temporary:
                shutil.copyfile(plan, temporary)
                _compare(temporary, expected)
        except (OSError, ValueError, TypeError, KeyError) as error:
            _LOG.warning("cache entry %s is damaged (%s); building again", plan, error)
            destination.unlink(missing_ok=True)
            record_file.unlink(missing_ok=True)
            plan.unlink(missing_ok=True)
            return None
        return record

    def store(self, key: str, engine: Path, record: Mapping[str, Any]) -> None:
        """Keep a copy of `engine`; its record is written last and makes the entry count."""
        with atomic_file(self.folder / f"{key}.plan") as temporary:
            shutil.copyfile(engine, temporary)
        write_json(self.folder / f"{key}.json", {"sha256": sha256_of(engine), "record": dict(record)})

    def timing_file(self, version: str, target: str) -> Path:
        """Where kernel timings of one TensorRT version on one GPU are kept."""
        return self.folder / f"timing-{version}-{target}.cache"


def _compare(file: Path, expected: str) -> None:
    if sha256_of(file) != expected:
        raise ValueError("its sha256 differs")
