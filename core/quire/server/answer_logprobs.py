"""Log-probabilities in the two forms that OpenAI's routes have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quire.request import Logprob

LOWEST = -9999.0
TokenBytes = Callable[[int], bytes]
Entry = dict[int, Logprob]


def token_id_bytes(token_id: int) -> bytes:
    """Spell a token by its id, for `return_tokens_as_token_ids`. Source: vLLM."""
    return b"token_id:%d" % token_id


def _value(logprob: float) -> float:
    return max(logprob, LOWEST)


def _text(token_id: int, token_bytes: TokenBytes) -> str:
    return token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(
    entries: Sequence[Entry], num_top: int, token_bytes: TokenBytes
) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice; an entry's first token is the chosen one."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": _value(logprob), "bytes": list(raw)}

    content = []
    for entry in entries:
        chosen = next(iter(entry))
        top = sorted(entry.items(), key=lambda item: -item[1].logprob)[:num_top]
        item = one(chosen, entry[chosen].logprob)
        item["top_logprobs"] = [one(token_id, found.logprob) for token_id, found in top]
        content.append(item)
    return {"content": content, "refusal": None}


def prompt_logprobs(
    entries: Sequence[Entry | None] | None, num_top: int
) -> list[dict[str, Any] | None] | None:
    """Return a prompt's log-probabilities by token id, as vLLM writes them."""
    if entries is None:
        return None
    return [None if entry is None else _by_id(entry, num_top) for entry in entries]


def _by_id(entry: Entry, num_top: int) -> dict[str, Any]:
    own = next(iter(entry))
    return {
        str(token_id): {
            "logprob": _value(found.logprob),
            "rank": found.rank,
            "decoded_token": found.decoded_token,
        }
        for token_id, found in entry.items()
        if token_id == own or (found.rank or 0) <= num_top
    }


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion; offsets count on from chunk to chunk."""

    def __init__(self, num_top: int, token_bytes: TokenBytes) -> None:
        self._num_top = num_top
        self._token_bytes = token_bytes
        self._offset = 0

    def add(self, token_ids: Sequence[int], entries: Sequence[Entry | None]) -> dict[str, Any]:
        """Return the object for these tokens; an entry is None for a prompt's first token."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = _text(token_id, self._token_bytes)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            values.append(None if entry is None else _value(entry[token_id].logprob))
            tops.append(None if entry is None else self._top(entry))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, entry: Entry) -> dict[str, float]:
        best = sorted(entry.items(), key=lambda item: -item[1].logprob)[: max(self._num_top, 1)]
        chosen = next(iter(entry))
        found = {_text(i, self._token_bytes): _value(p.logprob) for i, p in best}
        found.setdefault(_text(chosen, self._token_bytes), _value(entry[chosen].logprob))
        return found
