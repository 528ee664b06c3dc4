"""What clients are told when something is wrong: OpenAI's error object, and the right status.

Every text comes from here or from Quire's own exceptions; an unknown exception's is never sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from quire.errors import CONTRADICTION, EngineDeadError, OverloadedError, QuireError, RequestError
from quire.text.input_processor import ContextLengthError
from quire.text.json_files import shorten

MAX_MESSAGE_CHARS = 600
INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
# What failed once will fail again: OpenAI's clients heed this header, and retry 500 without it.
NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """An answer that says what is wrong. `param` names the field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _cut(message)
        self.type = INVALID_REQUEST if status < 500 else SERVER_ERROR
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """Return the error object; it fits into 4 KB whatever was asked."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def body(self) -> bytes:
        """Return the error object as JSON."""
        return msgspec.json.encode(self.to_json())


def _cut(message: str) -> str:
    """Shorten a message, and make what UTF-8 cannot hold visible."""
    message = message.encode("utf-8", "backslashreplace").decode()
    if len(message) <= MAX_MESSAGE_CHARS:
        return message
    return message[: MAX_MESSAGE_CHARS - 3] + "..."


def to_api_error(error: BaseException) -> ApiError:
    """Return what a client is told of an exception."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, str(error), param=error.parameter, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), param=error.parameter)
        case OverloadedError():
            headers = {"Retry-After": str(error.retry_after_s)}
            return ApiError(503, str(error), code=error.code, headers=headers)
        case EngineDeadError():
            return ApiError(500, str(error), code="engine_dead")
        case SequenceFailed():
            status = 400 if str(error).startswith(CONTRADICTION) else 500
            return ApiError(status, str(error), code="sequence_failed", headers=NO_RETRY)
        case QuireError():
            return ApiError(500, f"the request failed: {error}")
    return ApiError(
        500,
        "an internal error; the server's log has the details.",
        code="internal",
        headers=NO_RETRY,
    )


class SequenceFailed(Exception):
    """Report a choice that ended with an error, or was aborted by the server."""


def model_not_found(name: str) -> ApiError:
    """Refuse a model that is not served."""
    return ApiError(
        404,
        f"the model {shorten(name)} does not exist; GET /v1/models lists what is served.",
        param="model",
        code="model_not_found",
    )


def unauthorized() -> ApiError:
    """Refuse a request without a right key."""
    return ApiError(
        401,
        "the API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def foreign_origin() -> ApiError:
    """Refuse a page of another site, which a browser lets open a WebSocket without asking."""
    return ApiError(
        403,
        "the page's origin may not open a WebSocket here; --allowed-origins lets origins in.",
        code="origin_not_allowed",
    )


def preflight_refused() -> ApiError:
    """Refuse a browser that asks whether a page may do something."""
    return ApiError(
        400,
        "the page's origin, method or headers are not allowed; --allowed-origins lets origins in.",
        code="origin_not_allowed",
    )


def too_large(limit: int) -> ApiError:
    """Refuse a body above the limit."""
    return ApiError(
        413,
        f"the body is larger than {limit} bytes; send less, or raise --max-body-bytes.",
        code="body_too_large",
    )


def header_too_large(limit: int) -> ApiError:
    """Refuse headers above the limit."""
    return ApiError(
        431,
        f"request line and headers are larger than {limit} bytes, or too many; send less.",
        code="headers_too_large",
    )


def timed_out(what: str) -> ApiError:
    """Give up on a client that sends too slowly."""
    return ApiError(408, f"the {what} did not arrive in time.", code="timeout")


def malformed(what: str) -> ApiError:
    """Refuse bytes that are not HTTP."""
    return ApiError(400, f"not a request in HTTP/1.1: {what}.", code="malformed_request")


def unsupported_media_type(given: str) -> ApiError:
    """Refuse a body that does not claim to be JSON."""
    return ApiError(
        415,
        f"the content type is {shorten(given)}; allowed: application/json.",
        code="unsupported_media_type",
    )


def not_found(path: str) -> ApiError:
    """Refuse a path that no route has."""
    return ApiError(
        404, f"no such path: {shorten(path)}; /openapi.json lists all.", code="not_found"
    )


def method_not_allowed(allowed: str) -> ApiError:
    """Refuse a method that a path does not have."""
    return ApiError(
        405,
        f"the method is not allowed here; allowed: {allowed}.",
        code="method_not_allowed",
        headers={"Allow": allowed},
    )
