"""`/v1/characters`: people who are registered once, and named by an id in requests for videos."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse

from proteus_deploy.serving.access import KeyOf, OwnerOf, ServiceOf
from proteus_deploy.serving.answers import ApiError
from proteus_deploy.serving.api_document import CharacterObject, CharacterPage, Deleted, answers, page_of
from proteus_deploy.serving.create_video import CreateCharacter, CreateVideo, read_body

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service

__all__ = ["add_character_routes", "with_character"]

# How long registering waits for a worker; one that makes a video answers later.
_WAIT_S, _LOOK_S = 10.0, 0.05

_SCHEMA = CreateCharacter.model_json_schema()
_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _SCHEMA}, "multipart/form-data": {"schema": _SCHEMA}},
    }
}


def with_character(
    service: Service, owner: str, body: CreateVideo, photo: bytes | None
) -> tuple[CreateVideo, bytes | None]:
    """The body and the photo, those of the character where one is named; what the body says itself counts."""
    if body.character is None:
        return body, photo
    if photo is not None:
        text = "character and input_reference were both sent; a video has one person: send one of them"
        raise ApiError(400, text, param="character", code="invalid_value")
    character = service.characters.get(body.character, owner)
    if character.failure is not None:
        text = f"the photo of {character.id} could not be encoded: {character.failure.message}"
        raise ApiError(409, text, param="character", code="character_failed")
    face = character.face_index if body.face_index is None else body.face_index
    words = body.identity_prompt or character.identity_prompt
    changed = body.model_copy(update={"identity_prompt": words, "face_index": face})
    return changed, service.characters.photo(character.id, owner)


def add_character_routes(app: FastAPI) -> None:
    """Register a person, look at them, forget them."""

    made = answers(CharacterObject, 400, 403, 409, 413, 415, 429)

    @app.post("/v1/characters", openapi_extra=_CREATE_BODY, responses=made)
    async def register(request: Request, service: ServiceOf, key: KeyOf) -> JSONResponse:
        """Keep a photo; a worker finds the face and encodes it, before all videos that wait."""
        from proteus_deploy.identity.photo import open_photo

        owner = key.name
        body, photo = await read_body(request, CreateCharacter)
        if photo is None:
            text = "input_reference is missing; send the reference photo of the person"
            raise ApiError(400, text, param="input_reference", code="missing")
        await run_sync(partial(open_photo, photo, max_pixels=service.settings.max_pixels))
        create = partial(
            service.characters.create,
            owner,
            photo,
            name=body.name,
            identity_prompt=body.identity_prompt,
            face_index=body.face_index,
            max_own_queued=key.max_queued,
        )
        character = await run_sync(create)
        service.supervisor.wake()
        clock = asyncio.get_running_loop().time
        until_s = clock() + (_WAIT_S if service.supervisor.ready else 0.0)
        while character.status == "processing" and clock() < until_s and not service.stopping.is_set():
            await asyncio.sleep(_LOOK_S)
            character = await run_sync(service.characters.get, character.id, owner)
        if character.failure is not None:
            await run_sync(service.characters.delete, character.id, owner)
            raise ApiError(400, character.failure.message, param="input_reference", code="invalid_value")
        return JSONResponse(character.to_json())

    @app.get("/v1/characters", responses=answers(CharacterPage, 404))
    def page(
        service: ServiceOf,
        owner: OwnerOf,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> dict[str, Any]:
        """The characters, newest first; `after` is the last id of the page before."""
        found, more = service.characters.list(owner, after=after, limit=limit)
        data = [character.to_json() for character in found]
        return page_of(data, more=more)

    @app.get("/v1/characters/{character_id}", responses=answers(CharacterObject, 404))
    def get(character_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """Whether the photo is encoded, or why it can't be."""
        return service.characters.get(character_id, owner).to_json()

    @app.delete("/v1/characters/{character_id}", responses=answers(Deleted, 403, 404))
    def delete(character_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """Forget the person and the photo; videos that were asked for are still made."""
        service.characters.delete(character_id, owner)
        return {"id": character_id, "object": "character.deleted", "deleted": True}
