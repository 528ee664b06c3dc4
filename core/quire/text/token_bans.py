"""The tokens of bad words, and whether a request's bans leave any token to draw."""

from __future__ import annotations

from collections.abc import Iterable

from quire.errors import RequestError
from quire.request import SamplingParams
from quire.request_checks import MAX_BAD_WORD_TOKENS
from quire.text.json_files import shorten
from quire.text.tokenizer import Tokenizer, is_encodable

Word = tuple[int, ...]


def bad_words_token_ids(words: Iterable[str], tokenizer: Tokenizer | None) -> tuple[Word, ...]:
    """Return the tokens of each word without a space before it, and with one.

    The second form is left out where it ends in the first one, which then finds it too.
    Source: vLLM's `bad_words`, which also leaves it out where it has another number of tokens,
    and so lets " word" pass where it is one token and "word" several.
    Raises: RequestError for a word that has no tokens, or too many.
    """
    found: dict[Word, None] = {}
    for word in words:
        if tokenizer is None:
            raise _error("bad_words need a tokenizer; give forbidden_token_ids.")
        bare = _tokens(word.lstrip(), tokenizer)
        if not bare or len(bare) > MAX_BAD_WORD_TOKENS:
            raise _error(
                f"bad_words has {shorten(word)} of {len(bare)} tokens; "
                f"allowed: words of 1 to {MAX_BAD_WORD_TOKENS} tokens."
            )
        found[bare] = None
        spaced = _tokens(" " + word.lstrip(), tokenizer)
        if spaced[-len(bare) :] != bare and len(spaced) <= MAX_BAD_WORD_TOKENS:
            found[spaced] = None
    return tuple(found)


def _tokens(text: str, tokenizer: Tokenizer) -> Word:
    if not is_encodable(text):
        raise _error("bad_words has half a surrogate pair, which is not a character; leave it out.")
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def check_tokens_left(
    params: SamplingParams, words: tuple[Word, ...], stops: frozenset[int], vocab_size: int
) -> None:
    """Refuse bans after which a step may have no token to draw.

    A word of several tokens bans its last one in some steps: it counts as if in all. So do stop
    tokens until `min_tokens` are there.
    Raises: RequestError, naming what takes the last token away.
    """
    stops = stops if params.min_tokens else frozenset()
    allowed = params.allowed_token_ids
    num_banned = len(params.forbidden_token_ids) + len(words) + len(stops)
    if num_banned < (vocab_size if allowed is None else len(set(allowed))):
        return
    left = set(range(vocab_size) if allowed is None else allowed)
    bans = {
        "forbidden_token_ids": frozenset(params.forbidden_token_ids),
        "bad_words": frozenset(word[-1] for word in words),
        "min_tokens": stops,
    }
    for name, banned in bans.items():
        left -= banned
        if not left:
            raise RequestError(
                f"{name} may leave no token to generate; allow more tokens, or ban fewer.",
                parameter=name,
            )


def _error(message: str) -> RequestError:
    return RequestError(message, parameter="bad_words")
