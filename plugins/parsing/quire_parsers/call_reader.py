"""What the parsers of tool calls share: text as it comes, read by generators that wait for more."""

from __future__ import annotations

import abc
import json
from collections.abc import Collection, Generator, Sequence

from quire.interfaces.answer_parsing import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Piece,
    ToolCallParser,
)
from quire_parsers.json_scanner import JsonScanner, Malformed

BLANK = " \t\r\n"
MAX_NAME_CHARS = 256

Reading = Generator[None, None, None]


class CallReader(ToolCallParser):
    """Reads an answer front to back: `_read` yields wherever it needs more text than there is."""

    def __init__(self, tool_names: Collection[str] | None = None) -> None:
        self._tool_names = tool_names
        self._text = ""
        self._position = 0
        self._has_ended = False
        self._pieces: list[Piece] = []
        self._blank = ""  # white space that is dropped if a call follows
        self._is_after_call = False
        self._num_calls = 0
        self._source: list[str] = []  # of the call that is read
        self._is_open = False  # whether its arguments have begun and not ended
        self._reading = self._read()

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """Take more text; return what is certain by now."""
        self._text = self._text[self._position :] + text
        self._position = 0
        return self._go_on()

    def finish(self) -> list[Piece]:
        """End the answer; return the rest."""
        self._has_ended = True
        found = self._go_on()
        if self._blank and not self._is_after_call:
            found.append(Content(self._blank))
        return found

    @abc.abstractmethod
    def _read(self) -> Reading:
        """Read the whole answer."""

    def _go_on(self) -> list[Piece]:
        next(self._reading, None)
        found, self._pieces = self._pieces, []
        return _joined(found)

    # What there is to read.

    def _left(self) -> int:
        return len(self._text) - self._position

    def _need_one(self) -> Reading:
        """Wait for a character. Raises: Malformed at the end."""
        while not self._left():
            if self._has_ended:
                raise Malformed
            yield

    def _take(self, end: int) -> str:
        """Take the text up to a position, as part of the call that is read."""
        taken = self._text[self._position : end]
        self._position = end
        self._source.append(taken)
        return taken

    def _skip_blank(self) -> Reading:
        """Take white space, until something else or the end comes."""
        while True:
            end = self._position
            while end < len(self._text) and self._text[end] in BLANK:
                end += 1
            self._take(end)
            if self._left() or self._has_ended:
                return
            yield

    def _starts_with(self, literal: str) -> Generator[None, None, bool]:
        """Take a literal if it is what comes next."""
        while True:
            if self._text.startswith(literal, self._position):
                self._take(self._position + len(literal))
                return True
            if self._has_ended or not literal.startswith(self._text[self._position :]):
                return False
            yield

    def _skip_mark(self, mark: str) -> Generator[None, None, bool]:
        """Take a mark that ends calls, or its beginning where the answer was cut within it."""
        if (yield from self._starts_with(mark)):
            return True
        left = self._left()
        if self._has_ended and left and mark.startswith(self._text[self._position :]):
            self._take(self._position + left)
            return True
        return False

    def _demand(self, literal: str) -> Reading:
        """Take a literal. Raises: Malformed where something else comes."""
        if not (yield from self._starts_with(literal)):
            raise Malformed

    def _take_until(self, ends: Collection[str], limit: int) -> Generator[None, None, str]:
        """Take the text before the first of some characters. Raises: Malformed beyond a limit."""
        taken = ""
        while True:
            end = self._position
            while end < len(self._text) and self._text[end] not in ends:
                end += 1
            taken += self._take(end)
            if len(taken) > limit:
                raise Malformed
            if self._left():
                return taken
            yield from self._need_one()

    # What is no call.

    def _say(self, text: str) -> None:
        """Give content, and hold white space at its end back."""
        if self._is_after_call:
            text = text.lstrip()
            if not text:
                return
            self._is_after_call = False
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if shown:
            self._pieces.append(Content(shown))

    def _say_until(self, mark: str) -> Generator[None, None, bool]:
        """Give content up to a mark, which is left to be read; False at the end."""
        while True:
            found = self._text.find(mark, self._position)
            if found < 0:
                end = len(self._text) - (0 if self._has_ended else self._held(mark))
            else:
                end = found
            self._say(self._text[self._position : end])
            self._position = end
            if found >= 0 or self._has_ended:
                return found >= 0
            yield

    def _say_all(self) -> Reading:
        """Give everything that still comes as content."""
        while True:
            self._say(self._text[self._position :])
            self._position = len(self._text)
            if self._has_ended:
                return
            yield

    def _held(self, mark: str) -> int:
        """Return how many characters at the end may be the beginning of a mark."""
        for length in range(min(len(mark) - 1, self._left()), 0, -1):
            if self._text.endswith(mark[:length]):
                return length
        return 0

    # Calls.

    def _try(self, reading: Reading) -> Generator[None, None, bool]:
        """Read what should be a call; where it is none, its text is content."""
        self._source, self._is_open = [], False
        try:
            yield from reading
        except Malformed:
            source = "".join(self._source)
            if self._is_open:
                self._pieces.append(CallBroken(self._num_calls - 1, source))
                self._is_after_call = False
            else:
                self._say(source)
            return False
        return True

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        """Say that a call begins. Raises: Malformed for a function that is not on offer."""
        if self._tool_names is not None and name not in self._tool_names:
            raise Malformed
        if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise Malformed
        self._blank, self._is_after_call, self._is_open = "", True, True
        self._pieces.append(CallStart(self._num_calls, name, call_id))
        self._num_calls += 1

    def _add_arguments(self, text: str) -> None:
        if text:
            self._pieces.append(CallArguments(self._num_calls - 1, text))

    def _end_call(self) -> None:
        """Say that the arguments are whole: what follows is no part of them."""
        self._is_open = False
        self._source.clear()

    def _value(self, *, shown: bool = False) -> Generator[None, None, str]:
        """Take a JSON value; with `shown`, as the arguments of the call that has begun."""
        scanner = JsonScanner()
        taken = []
        while not scanner.is_done:
            try:
                scanner.take(self._text, self._position, is_last=self._has_ended)
            finally:
                taken.append(self._take(scanner.position))
                if shown:
                    self._add_arguments(taken[-1])
            if not scanner.is_done:
                yield
        return "".join(taken)

    def _call_of(self, name: str, call_id: str | None = None) -> Reading:
        """Read an object that is a call's arguments. Raises: Malformed."""
        yield from self._skip_blank()
        yield from self._need_one()
        if self._text[self._position] != "{":
            raise Malformed
        self._begin_call(name, call_id)
        yield from self._value(shown=True)
        self._end_call()

    def _hold_blank(self) -> Reading:
        """Pass over white space, which is content unless a call follows."""
        while True:
            end = self._position
            while end < len(self._text) and self._text[end] in BLANK:
                end += 1
            self._say(self._text[self._position : end])
            self._position = end
            if self._left() or self._has_ended:
                return
            yield


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Put neighbours of one kind together."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            found[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            found.append(piece)
    return found


def as_object(text: str) -> str | None:
    """Return arguments that stand as JSON within a JSON text, or as null, as an object's text."""
    value = json.loads(text)
    if value is None:
        return "{}"
    if not isinstance(value, str):
        return None
    inner, scanner = value.strip(), JsonScanner()
    try:
        inner.encode()  # half a surrogate pair is no text
        scanner.take(inner, 0, is_last=True)
    except (Malformed, UnicodeEncodeError):
        return None
    return inner if inner.startswith("{") and scanner.position == len(inner) else None
