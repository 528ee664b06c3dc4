"""What server and engine process say to each other: typed messages, never pickled objects."""

from __future__ import annotations

from typing import Any, cast

import attrs
import msgspec

from quire.errors import RequestError
from quire.pooling_params import PoolingInput
from quire.request import (
    SAMPLING_FIELDS,
    FinishReason,
    Request,
    SamplingParams,
    SequenceUpdate,
    TokenLogprobs,
)

# A message on the standard input of a process is one line of JSON; on the socket, MessagePack.


class Launch(msgspec.Struct, kw_only=True):
    """How to start: the engine's options as the user gave them, and where to connect to."""

    options: dict[str, Any]
    address: str


class Add(msgspec.Struct, tag=True, array_like=True):
    """A checked request. `params` holds what differs from SamplingParams' defaults."""

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    max_tokens: int
    seed: int
    eos_token_ids: list[int]
    stop_token_ids: list[int]
    bad_words_token_ids: list[tuple[int, ...]]
    priority: int
    cache_salt: str
    pooling: tuple[int | None, int, bool] | None = None


class Abort(msgspec.Struct, tag=True, array_like=True):
    """Requests that nobody waits for any more."""

    request_ids: list[str]


class Finish(msgspec.Struct, tag=True, array_like=True):
    """Sequences (request id, index) that ended outside, by a stop string."""

    sequences: list[tuple[str, int]]


class Stop(msgspec.Struct, tag=True, array_like=True):
    """End the process."""


class Update(msgspec.Struct, array_like=True):
    """A `SequenceUpdate` on its way; it has the same attributes."""

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    pooled: bytes | None = None


class StepStats(msgspec.Struct, array_like=True):
    """Where the engine stands after a step.

    `num_preemptions` and the prefix cache's token counts run from the start of the process.
    `step_time_s` is the time since the step was scheduled, `host_time_s` the part of it in which
    the host did not wait for the device. GPU figures are None without a GPU, or if unchanged.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    step_time_s: float = 0.0
    host_time_s: float = 0.0
    num_tokens: int = 0
    num_seqs: int = 0
    gpu_memory_used: int | None = None
    gpu_memory_total: int | None = None
    gpu_utilization: float | None = None


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The model is loaded. `phases_s` says how long each part of the start took.

    `identity` is all that decides what numbers come out, a line each. A step has at most
    `max_step_tokens`.
    """

    max_model_len: int
    num_blocks: int
    block_size: int
    phases_s: dict[str, float]
    identity: list[str]
    max_step_tokens: int = 0


class Stepped(msgspec.Struct, tag=True, array_like=True):
    """A step's updates; sent after every step, also without any: it is the heartbeat.

    `started` are the requests that left the queue in this step.
    """

    updates: list[Update]
    stats: StepStats
    started: list[str]


class Refused(msgspec.Struct, tag=True, array_like=True):
    """A request that the engine cannot serve."""

    request_id: str
    message: str
    parameter: str | None


class Failed(msgspec.Struct, tag=True, array_like=True):
    """The process ends. `exit_code` 2: a setting or file is wrong, and starting again is vain."""

    message: str
    traceback: str
    exit_code: int


ToEngine = Add | Abort | Finish | Stop
FromEngine = Ready | Stepped | Refused | Failed

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
_DEFAULTS = SamplingParams()
MAX_INTEGER = 2**64 - 1  # of MessagePack; a larger limit limits nothing


def add_of(request: Request) -> Add:
    """Return the message that carries a request."""
    params = request.params
    changed = {
        name: min(value, MAX_INTEGER) if type(value) is int else value
        for name in SAMPLING_FIELDS
        if (value := getattr(params, name)) != getattr(_DEFAULTS, name)
    }
    return Add(
        request_id=request.request_id,
        prompt_token_ids=list(request.prompt_token_ids),
        params=changed,
        max_tokens=request.max_tokens,
        seed=request.seed,
        eos_token_ids=list(request.eos_token_ids),
        stop_token_ids=list(request.stop_token_ids),
        bad_words_token_ids=list(request.bad_words_token_ids),
        priority=request.priority,
        cache_salt=request.cache_salt,
        pooling=None if (p := request.pooling) is None else attrs.astuple(p),
    )


def encoded_add(request: Request) -> bytes:
    """Return the message that carries a request, encoded. Raises: RequestError."""
    try:
        return encode(add_of(request))
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            f"sampling_params cannot be sent to the engine's process: {error}; give plain values.",
            parameter="sampling_params",
        ) from error


def request_of(message: Add, arrival_s: float) -> Request:
    """Return the request that a message carries. Raises: RequestError."""
    return Request(
        request_id=message.request_id,
        prompt_token_ids=cast(Any, message.prompt_token_ids),  # converted there
        params=SamplingParams(**message.params),
        max_tokens=message.max_tokens,
        seed=message.seed,
        eos_token_ids=frozenset(message.eos_token_ids),
        stop_token_ids=frozenset(message.stop_token_ids),
        bad_words_token_ids=tuple(message.bad_words_token_ids),
        priority=message.priority,
        arrival_s=arrival_s,
        cache_salt=message.cache_salt,
        pooling=None if (p := message.pooling) is None else _pooling_input(*p),
    )


def _pooling_input(second_at: int | None, num_skipped: int, is_whole: bool) -> PoolingInput:
    return PoolingInput(second_at=second_at, num_skipped=num_skipped, is_whole=is_whole)


def update_of(update: SequenceUpdate) -> Update:
    """Return the message that carries an update."""
    return Update(
        update.request_id,
        update.index,
        update.token_ids,
        update.finish_reason,
        update.stop_reason,
        update.error,
        update.num_cached_tokens,
        update.logprobs,
        update.prompt_logprobs,
        update.pooled,
    )
