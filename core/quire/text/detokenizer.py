"""Token ids to text, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

from quire.text.pieces import Piece
from quire.text.tokenizer import CLEAN_UPS, Tokenizer, clean_up_spaces

# Of a long prompt only its two ends are read: the beginning decides what is stripped, the end
# holds the character that may be incomplete.
MAX_PRIMED = 64
HEAD = 16
TAIL = 16

CLEAN_UP_CHARS = frozenset("".join(CLEAN_UPS))


class CleanUpFilter:
    """Remove spaces before punctuation from a text that arrives in pieces.

    A character that no pattern has parts a text into halves that do not touch each other.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what is certain."""
        self._held += text
        last = len(self._held)
        while last and self._held[last - 1] in CLEAN_UP_CHARS:
            last -= 1
        certain, self._held = self._held[:last], self._held[last:]
        return clean_up_spaces(certain)

    def peek(self, text: str) -> str:
        """Return what `push(text)` and `finish` would give together."""
        return clean_up_spaces(self._held + text)

    def finish(self) -> str:
        """Return the rest."""
        text, self._held = clean_up_spaces(self._held), ""
        return text


class IncrementalDetokenizer:
    """The text of one sequence's output, given out as soon as it is certain.

    All that `push` and `finish` return, put together, is `decode(prompt + output)` without the
    beginning that it shares with `decode(prompt)`; so a leading space of the output is kept where
    there is a prompt, and a character that the prompt began and the output completes is given
    out whole. It is the same for every way to cut the output into pushes. Each token costs the
    same however long the text is.

    Without `spaces_between_special_tokens` an added token that follows another one is written
    without the space that the decoder puts between tokens; as in vLLM this matters only where
    special tokens are shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        *,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.skipped_token_ids if skip_special_tokens else frozenset()
        self._stream = self._pieces.new_stream()
        self._clean_up = CleanUpFilter() if tokenizer.cleans_up_spaces else None
        # Tokens that are joined, and whether the latest shown one is such.
        is_joining = not (skip_special_tokens or spaces_between_special_tokens)
        self._joined = tokenizer.added_token_ids if is_joining else frozenset()
        self._prime(prompt_token_ids)
        self._follows_joined = bool(prompt_token_ids) and prompt_token_ids[-1] in self._joined
        # The end of the prompt's text that further tokens may still change. What they leave as
        # it was belongs to the prompt, not to the output.
        self._prompt_tail = self._peek()

    def push(self, token_ids: Sequence[int]) -> str:
        """Take more output; return the text that has become certain."""
        if self._joined:
            return self._without_prompt("".join(map(self._feed_joined, token_ids)))
        return self._without_prompt(self._feed(self._pieces.kept(token_ids, self._skipped)))

    def finish(self) -> str:
        """Return the rest: an incomplete character becomes U+FFFD, as in `decode`."""
        text = self._stream.finish()
        if self._clean_up is not None:
            text = self._clean_up.push(text) + self._clean_up.finish()
        return self._without_prompt(text)

    def _feed(self, pieces: Sequence[Piece]) -> str:
        text = "".join([self._stream.push(piece) for piece in pieces])
        return text if self._clean_up is None else self._clean_up.push(text)

    def _feed_joined(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        joins, self._follows_joined = self._follows_joined, token_id in self._joined
        if not joins or not self._follows_joined:
            return self._feed([piece])
        text = self._stream.push_joined(piece)
        return text if self._clean_up is None else self._clean_up.push(text)

    def _peek(self) -> str:
        text = self._stream.peek()
        return text if self._clean_up is None else self._clean_up.peek(text)

    def _without_prompt(self, text: str) -> str:
        """Drop what the prompt's own text had already."""
        tail = self._prompt_tail
        if not tail or not text:
            return text
        shared = next(
            (i for i, (a, b) in enumerate(zip(tail, text, strict=False)) if a != b),
            min(len(tail), len(text)),
        )
        self._prompt_tail = tail[shared:] if shared == len(text) else ""
        return text[shared:]

    def _prime(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) > MAX_PRIMED and self._clean_up is None:
            self._feed(self._pieces.kept(token_ids[:HEAD], self._skipped))
            tail = self._find_tail(token_ids)
            if tail is not None and self._stream.is_settled:
                self._stream.finish()
                self._feed(tail)
                return
            token_ids = token_ids[HEAD:]
        self._feed(self._pieces.kept(token_ids, self._skipped))

    def _find_tail(self, token_ids: Sequence[int]) -> list[Piece] | None:
        """Return the pieces at the end that alone decide what is incomplete there.

        At least `TAIL` of them, from a token that does not continue a run of byte tokens.
        None when there are no such.
        """
        is_window = self._pieces.plan is None
        tail: list[Piece] = []
        for index in range(len(token_ids) - 1, HEAD - 1, -1):
            tail += self._pieces.kept(token_ids[index : index + 1], self._skipped)
            if len(tail) >= TAIL and (is_window or not isinstance(tail[-1], int)):
                return tail[::-1]
        return None
