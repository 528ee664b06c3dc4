"""The ASGI application: routes, and what every request passes on its way to them."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import WebSocketRoute

from quire.errors import QuireError
from quire.server.access import AccessMiddleware, Cors, cors_middleware
from quire.server.bodies import Disconnected
from quire.server.errors import ApiError, method_not_allowed, not_found, to_api_error
from quire.server.generation_routes import GenerationRoutes
from quire.server.logs import RequestIdMiddleware
from quire.server.plain_routes import PlainRoutes
from quire.server.pooling_routes import PoolingRoutes
from quire.server.protocol.openapi import document
from quire.server.records import CLIENT_LEFT, RecordMiddleware, record_of
from quire.server.replies import error_response
from quire.server.service import Service
from quire.server.websocket_route import WebSocketChat

log = logging.getLogger("quire.server")


def build_app(service: Service) -> Any:
    """Return the whole application, outermost layer first."""
    app: Any = _routed(service)
    app = AccessMiddleware(app, service.keys, service.options.allowed_origins)
    cors = cors_middleware(service.options)
    if cors is not None:
        app = Cors(app, **cors)
    app = RecordMiddleware(app, service)
    return RequestIdMiddleware(app)


def _routed(service: Service) -> FastAPI:
    from quire import __version__

    # A redirect would send clients to whatever host their request names.
    app = FastAPI(title="Quire", version=__version__, redoc_url=None, redirect_slashes=False)
    app.router.default = _no_route
    schema = document("Quire", __version__)
    app.openapi = lambda: schema  # type: ignore[method-assign]
    plain, generation = PlainRoutes(service), GenerationRoutes(service)
    pooling = PoolingRoutes(service)
    posts = {
        "/v1/completions": generation.completions,
        "/v1/chat/completions": generation.chat,
        "/v1/responses": generation.responses,
        "/v1/embeddings": pooling.embeddings,
        "/v1/rerank": pooling.rerank,
        "/v1/score": pooling.score,
        "/v1/classify": pooling.classify,
        "/tokenize": plain.tokenize,
        "/detokenize": plain.detokenize,
    }
    gets = {
        "/v1/models": plain.models,
        "/v1/models/{name:path}": plain.model,
        "/health": plain.health,
        "/version": plain.version,
        "/metrics": plain.metrics,
    }
    for path, handler in posts.items():
        app.add_api_route(path, handler, methods=["POST"], include_in_schema=False)
    for path, handler in gets.items():
        app.add_api_route(path, handler, methods=["GET", "HEAD"], include_in_schema=False)
    app.router.routes.append(
        WebSocketRoute("/v1/chat/completions", WebSocketChat(service, generation))
    )
    app.add_exception_handler(Disconnected, _on_disconnect)
    for kind in (QuireError, ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


async def _no_route(scope: Any, receive: Any, send: Any) -> None:
    """Answer a path that is not there, a WebSocket's too."""
    error = not_found(scope["path"])
    scope["state"]["quire_error"] = error
    await error_response(error)(scope, receive, send)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Note that nobody waits for an answer."""
    record_of(request.scope).client_left = True
    return Response(status_code=CLIENT_LEFT)


async def _on_error(request: Request, error: Exception) -> Response:
    """Answer any exception with OpenAI's error object."""
    found = _routing_error(request, error) if isinstance(error, HTTPException) else error
    api_error = to_api_error(found)
    if api_error.code == "internal":
        log.error("a request failed", exc_info=error)
    request.scope["state"]["quire_error"] = api_error
    return error_response(api_error)


def _routing_error(request: Request, error: HTTPException) -> Exception:
    if error.status_code == 405:
        return method_not_allowed((error.headers or {}).get("Allow", "GET"))
    return error
