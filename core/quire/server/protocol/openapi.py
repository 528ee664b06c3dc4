"""The OpenAPI document of the server: its bodies from their types, its answers by hand."""

from __future__ import annotations

from typing import Any

import msgspec

from quire.server.protocol.chat import ChatCompletionRequest
from quire.server.protocol.completions import CompletionRequest
from quire.server.protocol.pooling import (
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from quire.server.protocol.responses import ResponsesRequest
from quire.server.protocol.tokens import DetokenizeRequest, TokenizeRequest

JSON = "application/json"
POSTS: dict[str, tuple[type, str]] = {
    "/v1/completions": (CompletionRequest, "Complete prompts"),
    "/v1/chat/completions": (ChatCompletionRequest, "Answer a conversation"),
    "/v1/responses": (ResponsesRequest, "Answer a text or a conversation"),
    "/v1/embeddings": (EmbeddingRequest, "Return embeddings"),
    "/v1/rerank": (RerankRequest, "Put documents in order"),
    "/v1/score": (ScoreRequest, "Compare texts"),
    "/v1/classify": (ClassifyRequest, "Return the classes of texts"),
    "/tokenize": (TokenizeRequest, "Return token ids"),
    "/detokenize": (DetokenizeRequest, "Return the text of token ids"),
}
GETS = {
    "/v1/models": "List the models",
    "/v1/models/{name}": "Describe a model",
    "/health": "Say whether requests are taken on",
    "/version": "Say which version runs",
    "/metrics": "Give the figures to Prometheus",
}
ERRORS = {
    "400": "Something in the request is wrong; `param` names it",
    "401": "The API key is missing or wrong",
    "404": "No such model or path",
    "408": "The request arrived too slowly",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "431": "The headers are too large",
    "500": "The request failed",
    "503": "Nothing more can be taken on now",
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(title: str, version: str) -> dict[str, Any]:
    """Return the document, OpenAPI 3.1."""
    bodies = [kind for kind, _ in POSTS.values()]
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    schemas["Error"] = ERROR_SCHEMA
    paths = {path: {"post": _post(kind, text)} for path, (kind, text) in POSTS.items()}
    paths |= {path: {"get": _get(path, text)} for path, text in GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    content = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {s: {"description": ERRORS[s], "content": content} for s in statuses}


def _post(kind: type, text: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content: dict[str, Any] = {JSON: {"schema": {"type": "object"}}}
    if "stream" in kind.__struct_fields__:  # type: ignore[attr-defined]
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": text,
        "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
        "responses": {"200": {"description": "Done", "content": content}, **_errors(tuple(ERRORS))},
    }


def _get(path: str, text: str) -> dict[str, Any]:
    kind = "text/plain" if path == "/metrics" else JSON
    schema = {"type": "string"} if path == "/metrics" else {"type": "object"}
    done = {"description": "Done", "content": {kind: {"schema": schema}}}
    statuses = ("401", "404", "431") if "{" in path else ("401", "431")
    operation: dict[str, Any] = {"summary": text, "responses": {"200": done, **_errors(statuses)}}
    if path == "/health":
        reason = {"description": "Not ready", "content": {JSON: {"schema": {"type": "object"}}}}
        operation["responses"]["503"] = reason
    if "{" in path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    return operation
