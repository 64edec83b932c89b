"""A JSON object read field by field: unknown fields refused, errors name file, field, value and rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proteus_deploy.errors import InputError
from proteus_deploy.model.config import shortened


class Fields:
    """Reader of one object. `path` says where in the file it stands, for messages."""

    def __init__(self, source: str, path: str, document: Any) -> None:
        self.source, self.path = source, path
        if not isinstance(document, dict):
            raise InputError(
                f"{source}: {path or 'the document'} is {shortened(document)}; it must be an object"
            )
        self.document: dict[str, Any] = document

    def name(self, field: str) -> str:
        return f"{self.path}.{field}".lstrip(".")

    def wrong(self, field: str, value: Any, rule: str) -> InputError:
        return InputError(f"{self.source}: field {self.name(field)!r} is {shortened(value)}; {rule}")

    def only(self, *known: str) -> None:
        for field in self.document:
            if field not in known:
                raise InputError(
                    f"{self.source}: field {self.name(field)!r} is unknown; known are {', '.join(known)}"
                )

    def get(self, field: str) -> Any:
        if field not in self.document:
            raise InputError(f"{self.source}: field {self.name(field)!r} is missing")
        return self.document[field]

    def text(self, field: str, default: str | None = None) -> str:
        value = self.get(field) if default is None else self.document.get(field, default)
        if not isinstance(value, str) or (default is None and not value):
            raise self.wrong(field, value, "it must be a text that is not empty")
        return value

    def choice(self, field: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        value = self.get(field) if default is None else self.document.get(field, default)
        if value not in choices:
            raise self.wrong(field, value, f"choose from {', '.join(choices)}")
        return value

    def flag(self, field: str) -> bool:
        value = self.document.get(field, False)
        if not isinstance(value, bool):
            raise self.wrong(field, value, "it must be true or false")
        return value

    def items(self, field: str, read: Callable[[Fields], Any]) -> tuple[Any, ...]:
        value = self.document.get(field, [])
        if not isinstance(value, list):
            raise self.wrong(field, value, "it must be a list")
        return tuple(
            read(Fields(self.source, f"{self.name(field)}[{index}]", entry))
            for index, entry in enumerate(value)
        )
