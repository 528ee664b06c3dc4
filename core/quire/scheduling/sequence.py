"""One stream of tokens being generated: what is known of it and how far it is computed."""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING

from quire.request import FinishReason, Request, TokenLogprobs

if TYPE_CHECKING:
    from quire.scheduling.beams import BeamGroup

NEVER = sys.maxsize


class SequenceStatus(enum.Enum):
    """Where a sequence stands. There are no phases: computing a prompt and decoding are one."""

    WAITING_TO_FORK = "waiting to fork"  # until the first sequence of its request has its prompt
    WAITING = "waiting"
    RUNNING = "running"  # has a row and blocks
    PREEMPTED = "preempted"  # waits again: its blocks were needed by a better standing
    PARKED = "parked"  # a beam without a row, whose next token depends on its siblings
    FINISHED = "finished"


class Sequence:
    """One sequence of a request; mutable, owned by the scheduler and its block manager.

    Positions are counted in tokens, at dispatch: a step in flight counts as done.

        num_computed_tokens <= num_tokens <= max_num_tokens
        0 ... prompt ... |... generated, known ...|... generated, in flight ...|
                                     len(token_ids)                   num_tokens
    """

    __slots__ = (
        "beams",
        "block_tables",
        "cache_epoch",
        "digests",
        "finish_reason",
        "index",
        "max_num_tokens",
        "missing_blocks",
        "next_commit_at",
        "next_leave_at",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_left_blocks",
        "num_prompt_tokens",
        "num_reserved_tokens",
        "num_to_fork",
        "num_tokens",
        "num_tokens_at_resume",
        "parent",
        "preempted_in_step",
        "prompt_logprobs",
        "request",
        "request_id",
        "row",
        "sequence_id",
        "standing",
        "status",
        "steady_until",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, sequence_id: int, request: Request, index: int, max_num_tokens: int) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.request_id = request.request_id
        self.index = index
        self.stop_token_ids = request.stop_token_ids
        self.status = SequenceStatus.WAITING
        self.standing = (0, sequence_id)  # lower is served first and preempted last
        self.finish_reason: FinishReason | None = None
        self.beams: BeamGroup | None = None  # its request's, in a beam search
        self.parent: Sequence | None = None  # whose blocks it may share; forgotten once admitted
        self.num_to_fork = 0  # siblings that may still share its prompt

        self.token_ids: list[int] = []  # prompt and collected tokens; filled when first admitted
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.num_computed_tokens = 0
        self.max_num_tokens = max_num_tokens  # a stop by length is known ahead
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache

        # While its position stays below, one token is scheduled without asking anybody: it has
        # the block, may write to it, and does not reach max_num_tokens.
        self.steady_until = 0
        self.row: int | None = None
        self.num_tokens_at_resume = 0
        self.preempted_in_step = 0  # the youngest step in flight then; resumes after it

        self.prompt_logprobs: list[TokenLogprobs] = []  # collected until its first token comes

        # Kept by the block manager.
        self.block_tables: list[list[int]] = []  # one list of block ids a group; 0: left behind
        self.num_left_blocks: list[int] = []  # a group: how many its window has left behind
        self.next_leave_at = NEVER  # computed tokens at which a window leaves another block
        self.num_reserved_tokens = 0  # positions that every group has a block for
        self.digests: list[list[bytes]] = []  # one chain a block size, each block hashed once
        self.num_committed_blocks: list[int] = []  # a group: blocks already offered to the cache
        self.next_commit_at = NEVER  # computed tokens at which another block is full
        self.cache_epoch = 0
        # Why it was not admitted: blocks needed in each group, tokens found in the cache.
        self.missing_blocks: tuple[list[int], int] | None = None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.sequence_id} {self.request_id!r}[{self.index}] {self.status.value}, "
            f"{self.num_computed_tokens} of {self.num_tokens} tokens, "
            f"{len(self.token_ids)} known, blocks {self.block_tables})"
        )

    @property
    def num_in_flight_tokens(self) -> int:
        """Tokens that are being sampled: dispatched, value not collected yet."""
        return self.num_tokens - len(self.token_ids)

    @property
    def is_drained(self) -> bool:
        """Whether its last token by length is in flight, so that nothing is left to schedule."""
        return self.num_tokens == self.max_num_tokens

    @property
    def owes_a_token(self) -> bool:
        """Whether it was resumed and has no token since: preempting it again would be a cycle."""
        return self.num_tokens == self.num_tokens_at_resume

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether all positions of its prompt must be computed, for their log-probabilities."""
        return (
            self.index == 0
            and self.request.params.prompt_logprobs is not None
            and len(self.token_ids) == self.num_prompt_tokens
        )
