"""The contracts of samplers and logits processors."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import Factory, define

from quire.request import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


class RowStatus(enum.IntEnum):
    """What a sampler found in a row; anything but OK ends that sequence alone."""

    OK = 0
    NOT_FINITE = 1
    OUT_OF_RANGE = 2


@define(kw_only=True)
class SamplingBatch:
    """How to draw the next token of each row of the logits; all tensors are [num_rows].

    `temperature` (0 is greedy), `top_p`, `min_p` float32; `top_k` int64 (the vocabulary's size:
    off); `seed`, `child_index`, `position` int64: the draw's counter. `rows` int32: persistent
    rows. The host's flags say what no row asks for, so that it need not be computed.
    `suppressed` holds (row, token id) index tensors of tokens that must not be drawn. What is not
    here, the core has done: logit bias and penalties are in the logits, log-probabilities taken.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    child_index: Tensor
    position: Tensor
    rows: Tensor
    all_greedy: bool
    any_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    suppressed: tuple[Tensor, Tensor] | None = None


@define(kw_only=True)
class SampledTokens:
    """What a sampler drew, on the device.

    `token_ids` int64 [num_rows, k], of which the first `num_tokens` int32 [num_rows] count (None:
    all); `status` int32 [num_rows] of RowStatus; `logprobs` float32 [num_rows, k] of the
    distribution that was drawn from, or None. Users get those of the model's own logits instead.
    """

    token_ids: Tensor
    status: Tensor
    num_tokens: Tensor | None = None
    logprobs: Tensor | None = None


class Sampler(abc.ABC):
    """Draw one token a row.

    A draw is a pure function of (seed, child index, position, token id), the same in every
    sampler and on every device, and made in two stages, so that noise is needed for few tokens.
    With s the logit / temperature of a token, -inf where the filters drop it:

    1. Tokens 64 g to 64 g + 63 are group g. The group of the largest logsumexp(s) + G(g, 1) wins.
    2. Of its tokens that of the largest s + G(token id, 0) is drawn.

    G(i, stage) is Gumbel noise: with x the Philox4x32-10 output lane i % 4 for counter
    (i // 4, position, child index, stage) and the seed's 64 bits as key, in float32,
    v = min((x + 0.5) / 2**32, 1 - 2**-24) and G = -log(-log1p(-v)).
    A group wins as often as its probability says, since the largest of its tokens' s + noise
    would be distributed as its logsumexp(s) + noise.
    Filters apply in this order: temperature, top_k, top_p, min_p.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Gumbel-max.

    A sampler with `capturable` may draw inside a CUDA graph: `sample` reads nothing back, and the
    memory that it takes does not depend on values. With `batch_invariant` a row's token depends on
    nothing else in the batch, not by a bit either.
    """

    capturable: ClassVar[bool] = False
    batch_invariant: ClassVar[bool] = False

    @classmethod
    def why_unsupported(cls, device: str) -> str | None:
        """Return None if the sampler runs on the device, else why not, in a sentence."""
        return None

    @abc.abstractmethod
    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Draw from `logits` [num_rows, vocab_size], which it may change, any float dtype.

        A row with NaN, +inf or no finite logit gets RowStatus.NOT_FINITE; its token is ignored.
        """


@define(kw_only=True)
class LogitsState:
    """What a processor sees of the rows, the token in flight included.

    `rows` int32 [num_rows]: persistent rows. `token_history` int32 [max_num_seqs, max_model_len]
    and `num_tokens` int32 [max_num_seqs] are on the device, by persistent row; a row's prompt has
    `num_prompt_tokens` int32 [max_num_seqs] tokens. `host_rows` are the rows on the host, and
    `host_token_ids` (by row) is filled only for a processor with `needs_host_tokens`.
    """

    rows: Tensor
    token_history: Tensor
    num_tokens: Tensor
    num_prompt_tokens: Tensor
    host_rows: list[int]
    host_token_ids: Mapping[int, list[int]] = Factory(dict)


class LogitsProcessor(abc.ABC):
    """Change the logits of the rows that ask for it, after bias and penalties, before the sampler.

    Arguments come from `SamplingParams.extra_args[name]`; a request cannot bring code.
    With `needs_host_tokens` no further step is scheduled before a row's tokens are on the host.
    With `batch_invariant` a row comes out with the same bits whatever else is in the batch.
    """

    name: ClassVar[str]
    needs_host_tokens: ClassVar[bool] = False
    batch_invariant: ClassVar[bool] = False

    def __init__(self, vocab_size: int, max_num_seqs: int, device: str) -> None:
        """Prepare for so many persistent rows."""
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.device = device

    @classmethod  # noqa: B027
    def check_arguments(cls, arguments: Any, params: SamplingParams) -> None:
        """Raise RequestError if a request's arguments for this processor are wrong."""

    def add_row(self, row: int, arguments: Any, params: SamplingParams) -> None:  # noqa: B027
        """Begin to serve a row; `arguments` is None for a request that has none."""

    def remove_row(self, row: int) -> None:  # noqa: B027
        """Forget a row."""

    @abc.abstractmethod
    def apply(self, logits: Tensor, state: LogitsState) -> Tensor:
        """Return the logits [num_rows, vocab_size], changed in place or not."""
