"""Which requests can be served at all, and how they stand against each other."""

from __future__ import annotations

from collections.abc import Callable

from quire.config import SchedulerOptions
from quire.errors import RequestError
from quire.request import Request
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.sequence import Sequence


class Admission:
    """Checks each request once, when it arrives, and gives it its rank."""

    def __init__(
        self,
        options: SchedulerOptions,
        block_manager: BlockManager,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        self._policy = options.scheduling_policy
        self._aging_s = options.priority_aging_s
        self._blocks = block_manager
        self._max_model_len = max_model_len
        self._clock = clock
        assert options.max_num_batched_tokens is not None, "the start knows how many pay"
        self._max_width = min(options.max_num_seqs, options.max_num_batched_tokens)

    def sequences(self, request: Request, first_id: int) -> list[Sequence]:
        """Return a request's sequences as they stand; of a beam search the first one alone.

        Raises: RequestError where they can never be computed.
        """
        max_num_tokens, rank = self.max_num_tokens(request), self.rank(request)
        n = request.params.n if request.params.beam_search is None else 1
        found = [Sequence(first_id + i, request, i, max_num_tokens) for i in range(n)]
        for sequence in found:
            sequence.standing = (rank, sequence.sequence_id)
        return found

    def max_num_tokens(self, request: Request) -> int:
        """Return how long a sequence of the request may become, its prompt included.

        Raises: RequestError where such a sequence can never be computed.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        if request.pooling is not None:
            return self._max_num_pooled(num_prompt_tokens)
        if num_prompt_tokens == 0:
            raise RequestError("the prompt is empty; give one token or more.", parameter="prompt")
        if num_prompt_tokens + 1 > self._max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens; the context of "
                f"{self._max_model_len} leaves room for {self._max_model_len - 1}. Shorten it or "
                f"raise --max-model-len.",
                parameter="prompt",
            )
        if request.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {request.max_tokens}; allowed: whole numbers from 1.",
                parameter="max_tokens",
            )
        max_num_tokens = min(num_prompt_tokens + request.max_tokens, self._max_model_len)
        if request.params.beam_search is not None:
            self._check_beams(request.params.beam_search.beam_width, request, max_num_tokens)
        if not self._blocks.can_ever_fit(max_num_tokens):
            raise RequestError(
                f"prompt and max_tokens come to {max_num_tokens} tokens, more than the whole KV "
                f"cache holds. Lower max_tokens or raise --kv-cache-memory-bytes.",
                parameter="max_tokens",
            )
        return max_num_tokens

    def _max_num_pooled(self, num_tokens: int) -> int:
        """Return the tokens of a sequence that gives a vector, which counts as one of them."""
        if not 0 < num_tokens <= self._max_model_len:
            raise RequestError(
                f"the input has {num_tokens} tokens; allowed: 1 to {self._max_model_len}.",
                parameter="input",
            )
        if not self._blocks.can_ever_fit(num_tokens):
            raise RequestError(
                f"the input has {num_tokens} tokens, more than the whole KV cache holds. Shorten "
                f"it or raise --kv-cache-memory-bytes.",
                parameter="input",
            )
        return num_tokens + 1

    def _check_beams(self, width: int, request: Request, max_num_tokens: int) -> None:
        """Refuse a search whose beams cannot all run side by side. Raises: RequestError."""
        if width > self._max_width:
            raise RequestError(
                f"the beam width is {width}, but a step has room for {self._max_width} sequences. "
                f"Lower it (over HTTP it is best_of, or n) or raise --max-num-seqs.",
                parameter="beam_width",
            )
        num_shared = len(request.prompt_token_ids)
        if not self._blocks.can_ever_fit(max_num_tokens, num_beams=width, num_shared=num_shared):
            raise RequestError(
                f"{width} beams of {max_num_tokens} tokens are more than the whole KV cache "
                f"holds. Lower max_tokens or the beam width, or raise --kv-cache-memory-bytes.",
                parameter="max_tokens",
            )

    def rank(self, request: Request) -> int:
        """Return how the request stands, lower is better; arrival order decides among equals.

        Everybody ages alike from arrival on, so the order of two effective priorities,
        priority - waited_s / priority_aging_s, never changes and is settled here, once.
        """
        if self._policy == "fcfs":
            return 0
        scale = 10**9  # whole numbers, so that no priority is too large to compare
        return request.priority * scale + int(self._clock() / self._aging_s * scale)
