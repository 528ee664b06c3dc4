"""Shapes of attention steps as people write them, and what each must read and compute. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attrs import frozen

MOST_TOKENS = 2**24
ALLOWED = (
    "decode:BxL or decode:L, prefill:N or prefill:BxN, chunk:Q@L or chunk:BxQ@L, and mixed: with "
    "parts of these joined by '+', such as mixed:64x4096+512@32768; B sequences, L tokens of "
    "each in all, N and Q of them in this step"
)
_ROWS = re.compile(r"(?:(\d{1,8})x)?(\d{1,8})(?:@(\d{1,8}))?")
DEFAULTS = {
    "cpu": (
        "decode:1x2048",
        "decode:16x1024",
        "prefill:512",
        "chunk:64@1024",
        "mixed:8x512+64@512",
    ),
    "cuda": (
        *("decode:1x1024", "decode:1x32768", "decode:64x4096", "decode:256x1024"),
        *("prefill:2048", "prefill:8192", "chunk:512@32768", "mixed:64x4096+512@4096"),
    ),
}
# What a picture needs: bandwidth against the context's length, a line a batch.
DRAWN = {
    "cpu": tuple(f"decode:{b}x{n}" for b in (1, 4, 16) for n in (256, 512, 1024, 2048)),
    "cuda": tuple(
        f"decode:{b}x{n}" for b in (1, 8, 64) for n in (1024, 2048, 4096, 8192, 16384, 32768)
    ),
}


@frozen(kw_only=True)
class Shape:
    """A step: (query length, length) of each sequence, those with one token first."""

    text: str
    kind: str
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read a shape. Raises: ValueError saying what is allowed."""
        kind, _, rest = text.partition(":")
        parts = rest.split("+") if kind == "mixed" else [rest]
        if kind not in ("decode", "prefill", "chunk", "mixed"):
            raise ValueError(f"{text!r} is no shape; allowed: {ALLOWED}")
        rows = [row for part in parts for row in _rows(text, kind, part)]
        if sum(length for _, length in rows) > MOST_TOKENS:
            raise ValueError(f"{text!r} has more than {MOST_TOKENS} tokens in all; take fewer")
        return cls(text=text, kind=kind, rows=tuple(sorted(rows, key=lambda row: row[0] > 1)))

    @property
    def num_tokens(self) -> int:
        """Return the tokens of the step."""
        return sum(query_len for query_len, _ in self.rows)

    @property
    def longest(self) -> int:
        """Return the length of the longest sequence."""
        return max(length for _, length in self.rows)


def _rows(text: str, kind: str, part: str) -> list[tuple[int, int]]:
    found = _ROWS.fullmatch(part)
    if found is None:
        raise ValueError(f"{text!r} is no shape; allowed: {ALLOWED}")
    count, number, behind = (None if piece is None else int(piece) for piece in found.groups())
    assert number is not None, "the pattern has it"
    has_past = behind is not None
    if has_past != (kind == "chunk") and not (has_past and kind == "mixed"):
        raise ValueError(f"{text!r} is no shape; allowed: {ALLOWED}")
    query_len = number if has_past or kind == "prefill" else 1
    length = number if behind is None else behind
    if not 1 <= query_len <= length or count == 0:
        raise ValueError(f"{text!r} has no token, or more new ones than tokens; allowed: {ALLOWED}")
    if (count or 1) * length > MOST_TOKENS:
        raise ValueError(f"{text!r} has more than {MOST_TOKENS} tokens in all; take fewer")
    return [(query_len, length)] * (count or 1)


def seen_pairs(rows: Sequence[tuple[int, int]], window: int | None) -> int:
    """Return how many (query, key) pairs count: causal, within the window."""
    return sum(_pairs(length, window) - _pairs(length - query, window) for query, length in rows)


def _pairs(length: int, window: int | None) -> int:
    """Return the pairs of a whole prompt."""
    inside = length if window is None else min(length, window)
    return inside * (inside + 1) // 2 + (length - inside) * inside


def seen_keys(rows: Sequence[tuple[int, int]], window: int | None) -> int:
    """Return how many keys some query of their sequence sees."""
    if window is None:
        return sum(length for _, length in rows)
    return sum(min(length, window + query - 1) for query, length in rows)
