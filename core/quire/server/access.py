"""Who may come in: API keys, each with a salt of its own; TLS; origins of browsers."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import ssl
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from quire.errors import ConfigError
from quire.server.errors import ApiError, foreign_origin, preflight_refused, unauthorized
from quire.server.options import ServerOptions

KEY_VARIABLE = "QUIRE_API_KEY"
OPEN_PATHS = ("/health",)
POLICY_VIOLATION = 1008


@frozen
class KeyIdentity:
    """A key that let a request in. `key_id` is safe to log; `cache_salt` parts prefix caches."""

    key_id: str
    cache_salt: str


class Keys:
    """The keys that are let in, as hashes."""

    def __init__(self, keys: Iterable[str], *, shares_cache: bool = False) -> None:
        secret = secrets.token_bytes(32)
        self._known: list[tuple[bytes, KeyIdentity]] = []
        for key in dict.fromkeys(keys):
            digest = hashlib.sha256(key.encode()).digest()
            name = hmac.new(secret, digest, hashlib.sha256).hexdigest()
            identity = KeyIdentity(name[:8], "" if shares_cache else name)
            self._known.append((digest, identity))

    @classmethod
    def from_options(cls, options: ServerOptions, environment: Mapping[str, str]) -> Keys | None:
        """Collect the keys; None where there are none. Raises: ConfigError, showing no key."""
        found = [("--api-key", key) for key in options.api_key]
        if options.api_key_file is not None:
            found += [("--api-key-file", key) for key in _read_keys(options.api_key_file)]
        if KEY_VARIABLE in environment:
            found += [(KEY_VARIABLE, key) for key in environment[KEY_VARIABLE].split(",")]
        for source, key in found:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"{source} has a key that is empty or has spaces or odd characters; give "
                    "printable ASCII without spaces."
                )
        keys = [key for _, key in found]
        return cls(keys, shares_cache=options.share_prefix_cache) if keys else None

    def find(self, authorization: bytes | None) -> KeyIdentity | None:
        """Return whose key a header carries; every key is compared, in constant time."""
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for known, identity in self._known:
            if hmac.compare_digest(known, digest):
                found = identity
        return found if scheme.lower() == b"bearer" else None


def _read_keys(name: str) -> list[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {name}: cannot be read: {error}.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {name}: has no key; write one a line.")
    return keys


def combined_salt(identity: KeyIdentity | None, own: str | None) -> str:
    """Return the salt of a request's prefix cache: its key's and its own together."""
    parts = ["" if identity is None else identity.cache_salt, own or ""]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest() if any(parts) else ""


class AccessMiddleware:
    """Lets in what carries a key; every path needs one but those that are open.

    No key keeps a page that a user of this machine looks at from opening a WebSocket: browsers
    ask nobody first, as they do for HTTP, so that its origin is looked at here.
    """

    def __init__(self, app: Any, keys: Keys | None, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._keys = keys
        self._origins = origins

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        error = None if scope["type"] == "lifespan" else self._error(scope)
        if error is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["quire_error"] = error
        await _refuse(scope, send, error)

    def _error(self, scope: Any) -> ApiError | None:
        if scope["type"] == "websocket" and _is_foreign(scope["headers"], self._origins):
            return foreign_origin()
        if self._keys is None or _is_open(scope):
            return None
        identity = self._keys.find(header(scope["headers"], b"authorization"))
        scope["state"]["quire_key"] = identity
        return unauthorized() if identity is None else None


def _is_foreign(headers: Sequence[tuple[bytes, bytes]], allowed: Sequence[str]) -> bool:
    """Whether a page asks that is neither this server's own nor of an allowed origin."""
    origin = header(headers, b"origin")
    if origin is None or "*" in allowed or origin.decode("latin-1") in allowed:
        return False
    return origin.partition(b"://")[2].lower() != (header(headers, b"host") or b"").lower()


def _is_open(scope: Any) -> bool:
    is_plain = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
    return is_plain and scope["path"] in OPEN_PATHS


async def _refuse(scope: Any, send: Any, error: ApiError) -> None:
    kind = "http.response"
    if scope["type"] == "websocket":
        kind = "websocket.http.response"
        if kind not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
    body = error.body()
    own = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    headers = [(name.lower().encode(), value.encode()) for name, value in own.items()]
    await send({"type": f"{kind}.start", "status": error.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


def header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return a header's value; names are lower case in ASGI."""
    return next((bytes(value) for key, value in headers if key == name), None)


_ORIGIN = re.compile(r"\*|https?://[^/\s,*]+")


def cors_middleware(options: ServerOptions) -> dict[str, Any] | None:
    """Return the arguments of starlette's CORSMiddleware, None where no origin may call.

    Raises: ConfigError.
    """
    if not options.allowed_origins:
        return None
    for origin in options.allowed_origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--allowed-origins has {origin!r}; allowed: SCHEME://HOST[:PORT] with http or "
                "https, or *."
            )
    return {
        "allow_origins": list(options.allowed_origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id"],
    }


class Cors(CORSMiddleware):
    """starlette's, with our error object where a page may not do what it asks for."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Say what a page may do."""
        response = super().preflight_response(request_headers)
        if response.status_code >= 400:
            response.body = preflight_refused().body()
            response.headers["content-type"] = "application/json"
            response.headers["content-length"] = str(len(response.body))
        return response


def tls_settings(options: ServerOptions) -> dict[str, str]:
    """Return uvicorn's TLS settings. Raises: ConfigError where key and certificate do not fit."""
    key, certificate = options.ssl_keyfile, options.ssl_certfile
    if key is None and certificate is None:
        return {}
    if key is None or certificate is None:
        raise ConfigError("TLS needs both --ssl-keyfile and --ssl-certfile; one is missing.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError too
        raise ConfigError(
            f"--ssl-certfile {certificate} and --ssl-keyfile {key} cannot be used together: {error}"
        ) from error
    return {"ssl_keyfile": key, "ssl_certfile": certificate}
