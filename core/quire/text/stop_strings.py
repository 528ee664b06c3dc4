"""Find stop strings in a text that arrives in pieces, holding back what may become one."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field


@define
class _Match:
    """How much of one stop string the end of the text spells: Knuth, Morris and Pratt."""

    stop: str
    fallback: list[int] = field(init=False)
    length: int = 0

    def __attrs_post_init__(self) -> None:
        self.fallback = [0] * (len(self.stop) + 1)
        length = 0
        for i in range(1, len(self.stop)):
            while length and self.stop[i] != self.stop[length]:
                length = self.fallback[length]
            length += self.stop[i] == self.stop[length]
            self.fallback[i + 1] = length

    def advance(self, char: str) -> bool:
        """Take one more character; answer whether it completes the stop string."""
        if self.is_complete:
            self.length = self.fallback[self.length]
        while self.length and self.stop[self.length] != char:
            self.length = self.fallback[self.length]
        self.length += self.stop[self.length] == char
        return self.is_complete

    @property
    def is_complete(self) -> bool:
        """Whether the text ends with the whole stop string."""
        return self.length == len(self.stop)

    @property
    def pending(self) -> int:
        """How many characters at the end of the text may still become a stop string."""
        return self.fallback[self.length] if self.is_complete else self.length


class StopChecker:
    """Cut a growing text at its first stop string.

    The earliest start wins, then the order of `stops`; the answer does not depend on how the text
    is cut into pieces. A completed stop string is therefore held back for as long as an
    earlier-starting one may still complete. `end` is where the found one ends, in characters of
    the whole text.
    """

    def __init__(self, stops: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        self._matches = [_Match(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._include = include_stop_str_in_output
        self._held = ""
        self._num_given = 0
        self._position = 0
        self._best: tuple[int, int] | None = None
        self.stop: str | None = None
        self.end: int | None = None

    @property
    def candidate_end(self) -> int | None:
        """Where the stop string ends that wins unless an earlier one completes."""
        if self._best is None:
            return None
        start, order = self._best
        return start + len(self._matches[order].stop)

    def push(
        self, text: str, finished: bool = False, *, search: bool = True
    ) -> tuple[str, str | None]:
        """Take more text; return what is certain and the stop string if one was found.

        `finished` says that no more text follows. With `search` off, a stop string that ends in
        this text does not count (`min_tokens`), but one that only begins in it does.
        """
        if self.stop is not None:
            return "", None
        if not self._held and not finished and self._first_chars.isdisjoint(text):
            self._reset_matches(len(text))
            return text, None
        self._held += text
        for char in text:
            self._position += 1
            self._advance(char, search=search)
            if self._best is not None and self._is_settled():
                return self._cut()
        if finished and self._best is not None:
            return self._cut()
        return self._release(finished=finished), None

    def _reset_matches(self, num_chars: int) -> None:
        self._position += num_chars
        self._num_given += num_chars
        for match in self._matches:
            match.length = 0

    def _advance(self, char: str, *, search: bool) -> None:
        for order, match in enumerate(self._matches):
            if match.advance(char) and search:
                found = (self._position - match.length, order)
                self._best = found if self._best is None else min(self._best, found)

    def _is_settled(self) -> bool:
        """Whether no stop string that is half spelled could still win over the best."""
        assert self._best is not None
        return all(
            match.is_complete
            or match.length == 0
            or (self._position - match.length, order) > self._best
            for order, match in enumerate(self._matches)
        )

    def _cut(self) -> tuple[str, str]:
        assert self._best is not None
        start, order = self._best
        self.stop = self._matches[order].stop
        self.end = start + len(self.stop)
        last = self.end if self._include else start
        text, self._held = self._held[: last - self._num_given], ""
        return text, self.stop

    def _release(self, *, finished: bool) -> str:
        """Give out all but the longest end that may become a stop string."""
        keep = 0 if finished else max((m.pending for m in self._matches), default=0)
        if self._best is not None:
            keep = max(keep, self._position - self._best[0])
        cut = len(self._held) - keep
        self._num_given += cut
        text, self._held = self._held[:cut], self._held[cut:]
        return text
