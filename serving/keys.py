"""API keys: who may use the server, and whose jobs are whose.

The file holds a name and the sha256 of a key on each line, so that reading it gives no key away. Keys have to
be long and random (32 bytes from a generator); a hash without salt is then as good as one with. Behind them
may stand what the key is held to: `read-only`, and `max-queued=N`, the jobs of it that may wait.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from proteus_deploy.errors import InputError

__all__ = ["ANONYMOUS", "Key", "Keys"]

ANONYMOUS = "anonymous"

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([0-9a-f]{64})((?:\s+\S+)*)")
_MAX_QUEUED = re.compile(r"max-queued=([1-9][0-9]{0,8})")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Key:
    """name: whose jobs are whose. read_only: it may look and fetch. max_queued: its jobs that may wait."""

    name: str
    read_only: bool = False
    max_queued: int | None = None


class Keys:
    """sha256 of a key -> what it may; without any, everybody is `ANONYMOUS`."""

    def __init__(self, known: dict[str, Key] | None = None) -> None:
        self._known = known

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file; empty lines and lines that begin with # don't count.

        Raises InputError for a file that is missing or too large, for a line of another form, a name or a key
        that stands there twice, and a file without keys. No message holds what a line says.
        """
        if not path.is_file():
            raise InputError(
                f"{path} is not a file; it must hold a name and the sha256 of a key on each line"
            )
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than {_MAX_BYTES} bytes; that is no file of keys")
        known: dict[str, Key] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None:
                raise InputError(
                    f"{path}, line {number}: write a name and the sha256 of its key, 64 hex digits; "
                    "the latter is made with: printf %s KEY | sha256sum"
                )
            name, digest = found[1], found[2]
            if name in {key.name for key in known.values()} or digest in known or name == ANONYMOUS:
                raise InputError(
                    f"{path}, line {number}: the name or the key stands there twice, or is reserved"
                )
            known[digest] = _key_of(name, found[3].split(), f"{path}, line {number}")
        if not known:
            raise InputError(f"{path} holds no keys; nobody could use the server")
        return cls(known)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._known is not None

    def find(self, authorization: str | None) -> Key | None:
        """The key in an Authorization header; None when it has no right to anything."""
        if self._known is None:
            return Key(ANONYMOUS)
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer":
            return None
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every hash is looked at, so that the time says nothing.
        found = [key for known, key in self._known.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None


def _key_of(name: str, words: list[str], where: str) -> Key:
    read_only, max_queued = False, None
    for word in words:
        if word == "read-only":
            read_only = True
        elif limit := _MAX_QUEUED.fullmatch(word):
            max_queued = int(limit[1])
        else:
            raise InputError(
                f"{where}: behind name and hash may stand read-only and max-queued=N, N from 1; "
                "something else stands there"
            )
    return Key(name, read_only, max_queued)
