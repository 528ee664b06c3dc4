"""The server's own settings, beside the engine's: `quire serve --help` lists both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import fields, frozen

from quire.config import (
    Option,
    choice_setting,
    count_setting,
    flag_setting,
    names_setting,
    nearest,
    option_rows,
    seconds_setting,
    text_setting,
)
from quire.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")


@frozen(kw_only=True)
class ServerOptions:
    """Where to listen, whom to let in, and how much to take on."""

    host: str = text_setting("127.0.0.1", "address to listen on; 0.0.0.0 is every network")
    port: int = count_setting(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    served_model_name: tuple[str, ...] = names_setting(
        "names that requests may give the model; not given: MODEL as it was written"
    )
    api_key: tuple[str, ...] = names_setting("key that requests must carry; may be repeated")
    api_key_file: str | None = text_setting(None, "file with one key a line", optional=True)
    share_prefix_cache: bool = flag_setting(
        False, "let requests of different keys find each other's prompt beginnings"
    )
    allowed_origins: tuple[str, ...] = names_setting("origins that browsers may call from (CORS)")
    ssl_keyfile: str | None = text_setting(None, "private key for TLS", optional=True)
    ssl_certfile: str | None = text_setting(None, "certificate for TLS", optional=True)
    tool_call_parser: str | None = text_setting(
        None, "form of the model's tool calls, by the name of a parser", optional=True
    )
    enable_auto_tool_choice: bool = flag_setting(
        False, "as in vLLM; --tool-call-parser alone is enough"
    )
    reasoning_parser: str | None = text_setting(
        None, "form of the model's thoughts, by the name of a parser", optional=True
    )
    tokenizer_pool_size: int = count_setting(
        2, "threads that tokenize and render chat templates", low=1, high=256, unit="threads"
    )
    max_queued_requests: int = count_setting(
        1024,
        "requests that may wait, beyond those that can run",
        low=1,
        high=2**20,
        unit="requests",
    )
    max_queued_tokens: int = count_setting(
        2**22, "prompt tokens of all waiting requests together", low=1, high=2**40, unit="tokens"
    )
    max_header_bytes: int = count_setting(
        16384, "request line and headers together", low=1024, high=2**20, unit="bytes"
    )
    max_body_bytes: int = count_setting(
        8 * 2**20, "body of one request", low=1024, high=2**32, unit="bytes"
    )
    header_timeout_s: float = seconds_setting(10.0, "time for the headers to arrive")
    body_timeout_s: float = seconds_setting(10.0, "longest pause while a body arrives")
    idle_timeout_s: float = seconds_setting(30.0, "time that a connection may stay unused")
    reader_timeout_s: float = seconds_setting(
        30.0, "time that a client may take nothing of its answer before it is given up"
    )
    keep_alive_s: float = seconds_setting(15.0, "pause of a stream after which a comment is sent")
    shutdown_timeout_s: float = seconds_setting(30.0, "time to finish requests after SIGTERM")
    stall_timeout_s: float = seconds_setting(
        60.0, "time without a step, while there is work, after which /health fails"
    )
    max_engine_restarts: int = count_setting(
        3, "times that a dead engine is started again within an hour", low=0, high=1000
    )
    log_level: str = choice_setting("info", LOG_LEVELS, "least important lines that are logged")
    log_json: bool = flag_setting(False, "log one JSON object a line")
    otel_endpoint: str | None = text_setting(
        None, "URL that OpenTelemetry's spans are sent to, over HTTP", optional=True
    )
    log_prompts: bool = flag_setting(False, "log the prompts, which may be private")

    def __attrs_post_init__(self) -> None:
        """Refuse what would have no effect. Raises: ConfigError."""
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError(
                "--enable-auto-tool-choice needs --tool-call-parser NAME; "
                "`quire plugins --kind tool-call-parser` lists them."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ServerOptions:
        """Build from names and values. Raises: ConfigError."""
        known = [a.name for a in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"unknown server option {name!r}.{nearest(name, known)} "
                    "`quire serve --help` lists all."
                )
        return cls(**options)


SERVER_OPTIONS: dict[str, Option] = option_rows("server", ServerOptions)
