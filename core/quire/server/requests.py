"""From an HTTP request to what the engine is asked: body, model, parameters, prompt."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from quire.server.bodies import read_body
from quire.server.options import ServerOptions


async def body_of(request: Request, options: ServerOptions) -> bytes:
    """Read a body of JSON within the limits. Raises: ApiError, RequestError, Disconnected."""
    refused = request.scope["state"].get("quire_refused")
    if refused is not None:
        raise refused
    return await read_body(
        request.receive,
        limit=options.max_body_bytes,
        pause_s=options.body_timeout_s,
        content_type=_content_type(request.scope),
    )


def _content_type(scope: Any) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"content-type":
            return bytes(value)
    return None
