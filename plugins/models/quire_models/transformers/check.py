"""Does a class see earlier tokens through attention alone, and positions as it is told?

Asked once its weights are there, with attention that does not look around: a token's output may
then depend on the token and its position alone, so that a step may hold any tokens in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quire_models.transformers.config import Refusal

# Shares of the logits' spread that rounding may make, in 16 bits and in more: in another order, and
# in steps of other sizes, where rounded inputs of quantized products may fall to the other side.
NARROW_ERROR, WIDE_ERROR = 0.05, 0.01
NARROW_DRIFT, WIDE_DRIFT = 0.3, 0.05
ORDER = (3, 0, 5, 4, 1, 2)
# Logits [num_tokens, vocab_size] of token ids as the class itself is called, and of token ids and
# positions as Quire calls it.
Own = Callable[[Tensor], Tensor]
Ours = Callable[[Tensor, Tensor], Tensor]


def stand_in(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what only its own query, key and value make of a token: [1, tokens, heads, dim].

    Each of [1, heads, tokens, head_dim].
    """
    repeats, size = query.shape[1] // key.shape[1], value.shape[-1]
    own = (query + key.repeat_interleave(repeats, 1)).tanh()
    if own.shape[-1] != size:
        own = own.mean(-1, keepdim=True)
    return (own + value.repeat_interleave(repeats, 1)).transpose(1, 2)


def takes_embeddings(own: Own, ours: Ours, vocab_size: int, device: torch.device) -> bool:
    """Answer whether a class makes of its embeddings what it makes of the tokens themselves."""
    ids, positions = _tokens(vocab_size, device)
    plain = own(ids)
    return _error(plain, ours(ids, positions)) <= _allowed(plain)


def check_tokens_alone(own: Own, ours: Ours, vocab_size: int, device: torch.device) -> None:
    """Compare what a class makes of a prompt with what Quire lets it make of the same tokens.

    Raises: Refusal where they differ.
    """
    ids, positions = _tokens(vocab_size, device)
    order = torch.tensor(ORDER, device=device)
    plain = own(ids)
    if _error(plain, ours(ids, positions)) > _allowed(plain):
        raise Refusal("counts positions otherwise than from 0 on.")
    if _error(plain[order], ours(ids[order], positions[order])) > _allowed(plain):
        raise Refusal(
            "sees other tokens than through attention (a state, a convolution, an average), or "
            "counts positions by itself."
        )


def _tokens(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.arange(len(ORDER), device=device)
    return (positions * 7 + 3) % vocab_size, positions


def _allowed(logits: Tensor, narrow: float = NARROW_ERROR, wide: float = WIDE_ERROR) -> float:
    return wide if torch.finfo(logits.dtype).bits > 16 else narrow


def check_cache(
    whole: Own,
    cached: Callable[[Tensor, int], Tensor],
    vocab_size: int,
    device: torch.device,
) -> None:
    """Compare a class with itself: a prompt at once, and token by token with its own cache.

    `whole(token_ids)` gives logits [num_tokens, vocab_size], and `cached(token_ids, n)` those of a
    prompt of n tokens and then of one after another. Raises: Refusal where they differ: Quire
    serves what the class makes without its cache, `generate` what it makes with it.
    """
    ids, _ = _tokens(vocab_size, device)
    plain = whole(ids)
    if _error(plain, cached(ids, len(ORDER) // 2)) > _allowed(plain, NARROW_DRIFT, WIDE_DRIFT):
        raise Refusal("makes other tokens with its own cache than without one")


def check_attention(whole: Own, ours: Ours, vocab_size: int, device: torch.device) -> None:
    """Compare a class's own attention with what it was seen to ask for, written out as a formula.

    Raises: Refusal where they differ.
    """
    ids, positions = _tokens(vocab_size, device)
    plain = whole(ids)
    if _error(plain, ours(ids, positions)) > _allowed(plain):
        raise Refusal("attends otherwise than by what it asks of its attention function")


def _error(expected: Tensor, found: Tensor) -> float:
    """Return the median over tokens of how far logits are off, as a share of their spread."""
    expected, found = expected.double(), found.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    errors = (expected - found).norm(dim=-1) / spread.clamp(min=1e-30)
    return float(errors.nan_to_num(torch.inf).median())
