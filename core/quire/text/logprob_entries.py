"""Log-probabilities as users get them: one dict a token."""

from __future__ import annotations

from quire.request import Logprob, TokenLogprobs
from quire.text.tokenizer import Tokenizer

Entry = dict[int, Logprob]


def entry_of(token_id: int, found: TokenLogprobs, tokenizer: Tokenizer | None) -> Entry:
    """Return the chosen token first, then the most likely ones that are not it, best first."""
    entry = {token_id: Logprob(found.logprob, found.rank, _spelling(token_id, tokenizer))}
    best = zip(found.top_ids, found.top_logprobs, strict=True)
    for rank, (other, logprob) in enumerate(best, start=1):
        if other not in entry:
            entry[other] = Logprob(logprob, rank, _spelling(other, tokenizer))
    return entry


def _spelling(token_id: int, tokenizer: Tokenizer | None) -> str | None:
    if tokenizer is None:
        return None
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
