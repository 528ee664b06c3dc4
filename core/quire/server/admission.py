"""How much the server takes on: requests and prompt tokens that wait, bounded before any work."""

from __future__ import annotations

from attrs import frozen

from quire.errors import OverloadedError

RETRY_AFTER_S = 1


@frozen(kw_only=True)
class ServingLimits:
    """How much an `AsyncEngine` takes on. Units as in `ServerOptions`."""

    tokenizer_pool_size: int = 2
    max_queued_requests: int = 1024
    max_queued_tokens: int = 2**22
    max_engine_restarts: int = 3


class Admission:
    """Counts what was taken on and not given back yet.

    `max_requests` counts waiting and running requests together, since only the engine tells them
    apart; `max_tokens` bounds the prompts of requests that have no token yet.
    """

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_requests = 0
        self.num_tokens = 0

    def take_request(self) -> None:
        """Count a request, before its prompt is looked at. Raises: OverloadedError."""
        if self.num_requests >= self.max_requests:
            raise OverloadedError(
                f"the queue is full: {self.num_requests} requests are waiting or running; "
                "try again later.",
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            )
        self.num_requests += 1

    def give_request(self) -> None:
        """Count a request less."""
        self.num_requests -= 1
        assert self.num_requests >= 0, "a request was given back twice"

    def take_tokens(self, count: int) -> None:
        """Count a prompt. A single one always fits. Raises: OverloadedError."""
        if self.num_tokens and self.num_tokens + count > self.max_tokens:
            raise OverloadedError(
                f"the queue is full: prompts of {self.num_tokens} tokens are waiting, and this one "
                f"has {count}; try again later.",
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            )
        self.num_tokens += count

    def give_tokens(self, count: int) -> None:
        """Count a prompt less."""
        self.num_tokens -= count
        assert self.num_tokens >= 0, "tokens were given back twice"
