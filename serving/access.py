"""What every route asks first: on which service, and whose request it is."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from proteus_deploy.serving.answers import ApiError
from proteus_deploy.serving.service import Service

__all__ = ["OwnerOf", "ServiceOf"]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


_bearer = HTTPBearer(auto_error=False, description="a key of the server's file, where it has one")


def _owner(service: ServiceOf, sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    """Whose request it is."""
    owner = service.keys.owner(None if sent is None else f"{sent.scheme} {sent.credentials}")
    if owner is None:
        raise ApiError(
            401,
            "this server needs a key that it knows: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner


OwnerOf = Annotated[str, Depends(_owner)]
