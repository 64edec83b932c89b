"""API keys: who may use the server, and whose jobs are whose.

The file holds a name and the sha256 of a key on each line, so that reading it gives no key away. Keys have to
be long and random (32 bytes from a generator); a hash without salt is then as good as one with.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from proteus_deploy.errors import InputError

__all__ = ["ANONYMOUS", "Keys"]

ANONYMOUS = "anonymous"

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([0-9a-f]{64})")
_MAX_BYTES = 1 << 20


class Keys:
    """Name -> sha256 of its key; without any, everybody is `ANONYMOUS`."""

    def __init__(self, hashes: dict[str, str] | None = None) -> None:
        self._hashes = hashes

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
        hashes: dict[str, str] = {}
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
            if name in hashes or digest in hashes.values() or name == ANONYMOUS:
                raise InputError(
                    f"{path}, line {number}: the name or the key stands there twice, or is reserved"
                )
            hashes[name] = digest
        if not hashes:
            raise InputError(f"{path} holds no keys; nobody could use the server")
        return cls(hashes)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._hashes is not None

    def owner(self, authorization: str | None) -> str | None:
        """The name behind an Authorization header; None when it has no right to anything."""
        if self._hashes is None:
            return ANONYMOUS
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer":
            return None
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every hash is looked at, so that the time says nothing.
        names = [name for name, known in self._hashes.items() if hmac.compare_digest(known, digest)]
        return names[0] if names else None
