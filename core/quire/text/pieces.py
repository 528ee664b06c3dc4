"""What each token adds to a text, and the state between tokens that a decoder needs.

`tokenizers` decodes whole lists. Its decoders are taken apart here, so that text can be given out
token by token and still equal the whole list's, for any ids.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol

from attrs import frozen

UNKNOWN_CHAR = "\ufffd"
# A longer run of byte tokens is given out before it ends, so that a stream in a script that the
# vocabulary lacks does not stall; should it then turn invalid, decode() would differ.
MAX_HELD_BYTES = 64
WINDOW_CONTEXT = 6
MAX_HELD_WINDOW = 32

Piece = bytes | str | int


@frozen(kw_only=True)
class DecoderPlan:
    """A decoder as data. `is_byte_level` excludes all the rest.

    `strip` is a character and how many of it the text's beginning loses; `metaspace` a character
    that the first token loses and all others show as a space; `separator` joins tokens.
    """

    is_byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: tuple[str, int] = ("", 0)
    metaspace: str = ""
    separator: str = ""

    def piece(self, token: str) -> Piece:
        """Return bytes for a byte-level token, an int for a byte-fallback token, else text."""
        if self.is_byte_level:
            return _byte_level_bytes(token)
        for old, new in self.replacements:
            token = token.replace(old, new)
        byte = _fallback_byte(token) if self.byte_fallback else None
        return token if byte is None else byte


def read_plan(state: bytes | None) -> DecoderPlan | None:
    """Return the plan of a decoder's JSON state; None for one that is not known by heart."""
    if state is None:
        return DecoderPlan(separator=" ")
    decoder = json.loads(state)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = tuple(step["type"] for step in steps)
    if kinds == ("ByteLevel",):
        return DecoderPlan(is_byte_level=True)
    if kinds == ("Metaspace",):
        char = steps[0]["replacement"]
        if steps[0].get("prepend_scheme", "always") == "never":
            return DecoderPlan(replacements=((char, " "),))
        return DecoderPlan(metaspace=char)
    return _plan_of_steps(steps)


def _plan_of_steps(steps: Sequence[dict[str, Any]]) -> DecoderPlan | None:
    """Read Replace..., ByteFallback, Fuse, Strip in this order; each may be missing."""
    left = list(steps)
    replacements = []
    while left and left[0]["type"] == "Replace" and "String" in left[0]["pattern"]:
        step = left.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(left) and left[0]["type"] == "ByteFallback"
    left = left[1:] if byte_fallback else left
    is_fused = bool(left) and left[0]["type"] == "Fuse"
    left = left[1:] if is_fused else left
    strip = ("", 0)
    if is_fused and left and left[0]["type"] == "Strip" and left[0]["stop"] == 0:
        strip = (left[0]["content"], left[0]["start"])
        left = left[1:]
    if left:
        return None
    return DecoderPlan(replacements=tuple(replacements), byte_fallback=byte_fallback, strip=strip)


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's table from printable characters to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        # An added token with characters that stand for no byte is text as it is.
        return token.encode()


def _fallback_byte(token: str) -> int | None:
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


class Stream(Protocol):
    """Text that grows by pieces. `peek` is the text that `finish` would still add.

    `push_joined` adds a token without the space that the decoder would put before it.
    """

    def push(self, piece: Piece) -> str: ...
    def push_joined(self, piece: Piece) -> str: ...
    def peek(self) -> str: ...
    def finish(self) -> str: ...


class ByteLevelStream:
    """Byte-level tokens: bytes become text when their character is complete."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def is_settled(self) -> bool:
        """Whether the text's beginning no longer changes what follows."""
        return True

    def push(self, piece: Piece) -> str:
        assert isinstance(piece, bytes)
        return self._utf8.decode(piece)

    def push_joined(self, piece: Piece) -> str:
        return self.push(piece)  # no decoder of bytes adds spaces

    def peek(self) -> str:
        return self._utf8.getstate()[0].decode("utf-8", "replace")

    def finish(self) -> str:
        text = self.peek()
        self._utf8.reset()
        return text


class ByteRun:
    """Byte-fallback tokens in a row: all become text if the run is UTF-8, else none does."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._is_broken = False

    def push(self, byte: int) -> str:
        if self._is_broken:
            return UNKNOWN_CHAR
        self._held.append(byte)
        try:
            self._utf8.decode(bytes((byte,)))
        except UnicodeDecodeError:
            self._is_broken = True
            return self._take()
        is_whole = not self._utf8.getstate()[0]
        return self._take() if is_whole and len(self._held) >= MAX_HELD_BYTES else ""

    def peek(self) -> str:
        try:
            return self._held.decode("utf-8")
        except UnicodeDecodeError:
            return UNKNOWN_CHAR * len(self._held)

    def end(self) -> str:
        """Return the rest of the run; the next byte begins a new one."""
        if not self._held and not self._is_broken:
            return ""
        text = self._take()
        self._is_broken = False
        self._utf8.reset()
        return text

    def _take(self) -> str:
        text = self.peek()
        self._held.clear()
        return text


class PieceStream:
    """Tokens that are pieces of text, with byte fallback and a beginning that is stripped."""

    def __init__(self, plan: DecoderPlan) -> None:
        self._plan = plan
        self._run = ByteRun()
        self._left_to_strip = plan.strip[1]
        self._is_first = True

    @property
    def is_settled(self) -> bool:
        """Whether the text's beginning no longer changes what follows."""
        return not self._left_to_strip and not self._is_first

    def push(self, piece: Piece) -> str:
        is_first, self._is_first = self._is_first, False
        if isinstance(piece, int):
            return self._strip(self._run.push(piece))
        assert isinstance(piece, str)
        if self._plan.metaspace:
            piece = piece.replace(self._plan.metaspace, "" if is_first else " ")
        if not is_first:
            piece = self._plan.separator + piece
        return self._strip(self._run.end() + piece)

    def push_joined(self, piece: Piece) -> str:
        if isinstance(piece, int):
            return self.push(piece)
        assert isinstance(piece, str)
        self._is_first = False
        if self._plan.metaspace:
            piece = piece.removeprefix(self._plan.metaspace).replace(self._plan.metaspace, " ")
        return self._strip(self._run.end() + piece)

    def peek(self) -> str:
        return self._without_beginning(self._run.peek())

    def finish(self) -> str:
        return self._strip(self._run.end())

    def _without_beginning(self, text: str) -> str:
        char, count = self._plan.strip[0], self._left_to_strip
        num_equal = len(text) - len(text.lstrip(char)) if count and char else 0
        return text[min(count, num_equal) :]

    def _strip(self, text: str) -> str:
        if not self._left_to_strip or not text:
            return text
        kept = self._without_beginning(text)
        self._left_to_strip = 0 if kept else self._left_to_strip - len(text)
        return kept


class WindowStream:
    """Any other decoder: decode the last few ids with and without the new one.

    Pieces are ids. Equal to decoding all ids for decoders whose tokens depend on their near
    neighbours only.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_read = 0

    @property
    def is_settled(self) -> bool:
        """Whether the text's beginning no longer changes what follows."""
        return len(self._ids) >= WINDOW_CONTEXT

    def push(self, piece: Piece) -> str:
        assert isinstance(piece, int)
        self._ids.append(piece)
        text = self._rest()
        is_held = len(self._ids) - self._num_read < MAX_HELD_WINDOW
        if not text or (text.endswith(UNKNOWN_CHAR) and is_held):
            return ""
        self._ids = self._ids[-WINDOW_CONTEXT:]
        self._num_read = len(self._ids)
        return text

    def push_joined(self, piece: Piece) -> str:
        assert isinstance(piece, int)
        text = self.finish()
        self._ids, self._num_read = [piece], 1
        return text + self._decode([piece])

    def peek(self) -> str:
        return self._rest() if len(self._ids) > self._num_read else ""

    def finish(self) -> str:
        text = self.peek()
        self._num_read = len(self._ids)
        return text

    def _rest(self) -> str:
        before = self._decode(self._ids[: self._num_read])
        return self._decode(self._ids)[len(before) :]


class PieceTable:
    """The pieces of one tokenizer, worked out when first needed. Safe to share."""

    def __init__(
        self,
        decoder_state: bytes | None,
        id_to_token: Callable[[int], str | None],
        decode: Callable[[Sequence[int], bool], str],
    ) -> None:
        self.plan = read_plan(decoder_state)
        self._id_to_token = id_to_token
        self._decode = decode
        self._pieces: dict[int, Piece | None] = {}

    def __getitem__(self, token_id: int) -> Piece | None:
        """Return what a token adds, None for an id that no token has."""
        try:
            return self._pieces[token_id]
        except KeyError:
            token = self._id_to_token(token_id)
            piece: Piece | None = None
            if token is not None:
                piece = token_id if self.plan is None else self.plan.piece(token)
            self._pieces[token_id] = piece
            return piece

    def new_stream(self) -> ByteLevelStream | PieceStream | WindowStream:
        """Return an empty text that grows by this table's pieces."""
        if self.plan is None:
            return WindowStream(lambda ids: self._decode(ids, False))
        return ByteLevelStream() if self.plan.is_byte_level else PieceStream(self.plan)

    def kept(self, token_ids: Iterable[int], skipped: frozenset[int]) -> list[Piece]:
        """Return the pieces of the ids that add to a text."""
        found = (self[token_id] for token_id in token_ids if token_id not in skipped)
        return [piece for piece in found if piece is not None]
