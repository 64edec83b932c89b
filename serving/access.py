"""What every route asks first: on which service, and whose request it is."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from proteus_deploy.serving.answers import ApiError
from proteus_deploy.serving.keys import Key
from proteus_deploy.serving.service import Service

__all__ = ["KeyOf", "OwnerOf", "ServiceOf"]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


_bearer = HTTPBearer(auto_error=False, description="a key of the server's file, where it has one")


def _key(
    request: Request,
    service: ServiceOf,
    sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Key:
    """Whose request it is, and whether the key may do that."""
    key = service.keys.find(None if sent is None else f"{sent.scheme} {sent.credentials}")
    if key is None:
        raise ApiError(
            401,
            "this server needs a key that it knows: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if key.read_only and request.method not in ("GET", "HEAD"):
        raise ApiError(403, "this key may look and fetch, and change nothing", code="read_only_key")
    return key


def _owner(key: Annotated[Key, Depends(_key)]) -> str:
    return key.name


KeyOf = Annotated[Key, Depends(_key)]
OwnerOf = Annotated[str, Depends(_owner)]
