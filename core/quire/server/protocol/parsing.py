"""From bytes to a typed body: the first wrong thing ends it, in C and in one sentence."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from quire.config import nearest
from quire.errors import RequestError
from quire.request import MAX_LOGIT_BIAS
from quire.server.protocol.fields import REFUSED
from quire.text.json_files import shorten

Body = TypeVar("Body", bound=msgspec.Struct)

MAX_SHOWN = 60
MAX_LOOKED_BACK = 4096  # bytes before a mistake in which its field is searched
LARGE_BYTES = 2**16
HUGE_BYTES = 2**20  # from here on a body is looked at before it is parsed
MAX_CONTAINERS = 2**16  # lists and objects; ten times as many take 200 ms to parse
MAX_KEYS = MAX_LOGIT_BIAS + 2**12  # 500,000 take 100 ms

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_KEY = re.compile(rb'"(\w{1,64})"\s*:')
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_NOT_FINITE = re.compile(rb"-?(NaN|Inf)")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def parse(data: bytes, kind: type[Body]) -> Body:
    """Return the body of a request. Raises: RequestError, naming the field."""
    if not data.strip():
        raise RequestError("the body is empty; send a JSON object.")
    _check_containers(data)
    try:
        with _no_collection(data):
            return _decoder(kind).decode(data)
    except msgspec.ValidationError as error:
        raise _Mistake(str(error), data, kind).explain() from None
    except msgspec.DecodeError as error:
        raise _not_json(data, str(error), kind) from None
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8; send JSON in UTF-8.") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply; send plainer JSON.") from None


def _check_containers(data: bytes) -> None:
    """Refuse what would hold the event loop while objects are made of it.

    Brackets within texts are counted too: to tell them apart takes as long as to parse.
    """
    if len(data) < HUGE_BYTES:
        return
    count = data.count(b"[") + data.count(b"{")
    if count > MAX_CONTAINERS:
        raise RequestError(
            f"the body has {count} brackets and braces that open; at most {MAX_CONTAINERS} are "
            "allowed. Send plainer JSON."
        )
    keys = data.count(b'":')
    if keys > MAX_KEYS:
        raise RequestError(
            f"the body has {keys} keys; at most {MAX_KEYS} are allowed. Send plainer JSON."
        )


@contextlib.contextmanager
def _no_collection(data: bytes) -> Iterator[None]:
    """Keep the collector from a large body's objects, which JSON cannot make cyclic.

    It looks at all of them again and again while they come: 1.5 million lists took 760 ms, and
    100 ms without it.
    """
    if len(data) < LARGE_BYTES or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@functools.cache
def _decoder(kind: type[Body]) -> msgspec.json.Decoder[Body]:
    return msgspec.json.Decoder(kind)


def _not_json(data: bytes, text: str, kind: type[msgspec.Struct]) -> RequestError:
    half = _half_pair(data) if "truncated" in text or "surrogate" in text else None
    if half is not None:
        name = _field_before(data, half.start(), kind)
        fact = "has half a surrogate pair, which is not a character; leave it out"
        return RequestError(f"{name or 'the body'} {fact}.", parameter=name)
    found = re.search(r"\(byte (\d+)\)", text)
    position = int(found[1]) if found else len(data)
    if _NOT_FINITE.match(data, position) or _NOT_FINITE.match(data, max(0, position - 1)):
        name = _field_before(data, position, kind)
        fact = "has NaN or an infinity; allowed: finite numbers"
        return RequestError(f"{name or 'the body'} {fact}.", parameter=name)
    reason = shorten(text.removeprefix("JSON is malformed: "), 100).strip("'\"")
    return RequestError(f"the body is not JSON: {reason}; send a JSON object.")


def _half_pair(data: bytes) -> re.Match[bytes] | None:
    """Find half a surrogate pair in the beginning or the end: all of a large body takes 0.3 s."""
    found = _HALF_PAIR.search(data, 0, LARGE_BYTES)
    return found or _HALF_PAIR.search(data, max(0, len(data) - LARGE_BYTES))


def _field_before(data: bytes, position: int, kind: type[msgspec.Struct]) -> str | None:
    """Return the last field that was named before a position."""
    before = data[max(0, position - MAX_LOOKED_BACK) : position]
    names = [match.decode("ascii", "replace") for match in _KEY.findall(before)]
    known = set(kind.__struct_encode_fields__)
    return next((name for name in reversed(names) if name in known), None)


class _Mistake:
    """What the decoder says of the first value that does not fit, in our words."""

    def __init__(self, text: str, data: bytes, kind: type[msgspec.Struct]) -> None:
        found = _PLACE.search(text)
        self.path = found[1] if found else ""
        self.text = text[: found.start()] if found else text
        self.field = re.split(r"[.\[]", self.path, maxsplit=1)[0] or None
        self._data = data
        self._kind = kind

    def explain(self) -> RequestError:
        """Return the error for the client."""
        unknown = re.match(r"Object contains unknown field `(.*)`\Z", self.text, re.DOTALL)
        if unknown is not None:
            return self._unknown_field(unknown[1])
        missing = re.match(r"Object missing required field `(.*)`", self.text)
        if missing is not None:
            where = f"{self.path}.{missing[1]}" if self.path else missing[1]
            return self._error(f"{where} is missing; it is required.", missing[1])
        if not self.path:
            return RequestError(f"the body is {self._given()}; send a JSON object.")
        notes = _notes(self._kind)
        general = re.sub(r"\[[^]]*\]", "[]", self.path)
        allowed = _closest(notes, general)
        if allowed is None:
            fact = "is not supported by this version of Quire; leave it out"
            return self._error(f"{self.path} {fact}.")
        return self._error(f"{self.path} is {self._given()}; allowed: {allowed}.")

    def _error(self, message: str, name: str | None = None) -> RequestError:
        return RequestError(message, parameter=self.field or name)

    def _unknown_field(self, name: str) -> RequestError:
        if self.path:
            return self._error(
                f"{self.path} has the unknown field {shorten(name, MAX_SHOWN)}; leave it out."
            )
        short = name if len(name) <= MAX_SHOWN else name[: MAX_SHOWN - 3] + "..."
        hint = nearest(short, self._kind.__struct_encode_fields__)
        shown = shorten(name, MAX_SHOWN)
        return RequestError(f"unknown field {shown}.{hint} Leave it out.", parameter=short)

    def _given(self) -> str:
        """Say what was given: a plain value of the body's own fields, else its kind."""
        raw = self._raw_value() if self.path and self.path == self.field else b""
        if raw and raw[:1] not in b"[{":
            text = raw[: 2 * MAX_SHOWN].decode("utf-8", "replace")
            return text if len(raw) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
        got = re.search(r", got `(\w+)`\Z", self.text)
        if got is not None:
            return _KINDS.get(got[1], got[1])
        value = re.match(r"Invalid (?:enum )?value (.*)\Z", self.text, re.DOTALL)
        if value is not None:
            return shorten(value[1].strip("'"), MAX_SHOWN)
        if "length" in self.text:
            return "empty" if ">= 1" in self.text else f"too long{_size(raw)}"
        return "out of range"

    def _raw_value(self) -> bytes:
        try:
            fields = msgspec.json.decode(self._data, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return b""
        return bytes(fields.get(self.field or "", b""))


def _size(raw: bytes) -> str:
    """Say how many entries a list has, nothing of what is none."""
    if raw[:1] != b"[":
        return ""
    return f", with {len(msgspec.json.decode(raw, type=list[msgspec.Raw]))} entries"


def _closest(notes: dict[str, str | None], path: str) -> str | None:
    """Return what is allowed at a path: of the place itself, or of what holds it."""
    while path not in notes and path:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return notes.get(path, "what the OpenAPI document says")


@functools.cache
def _notes(kind: type[msgspec.Struct]) -> dict[str, str | None]:
    """Return what is allowed by path (`messages[].role`); None where all is refused."""
    notes: dict[str, str | None] = {}
    _collect(inspect.type_info(kind), "", notes)
    return notes


def _collect(info: Any, path: str, notes: dict[str, str | None]) -> None:
    if isinstance(info, inspect.Metadata):
        schema = info.extra_json_schema or {}
        if "description" in schema and path not in notes:
            is_refused = bool((info.extra or {}).get(REFUSED))
            notes[path] = None if is_refused else str(schema["description"])
        _collect(info.type, path, notes)
    elif isinstance(info, inspect.UnionType):
        for member in info.types:
            _collect(member, path, notes)
    elif isinstance(info, inspect.StructType):
        for field in info.fields:
            _collect(field.type, f"{path}.{field.encode_name}".lstrip("."), notes)
    elif isinstance(info, inspect.ListType):
        # What a list of plain values may hold, the list's own description says.
        if path not in notes or _has_struct(info.item_type):
            _collect(info.item_type, f"{path}[]", notes)
    elif path not in notes:
        notes[path] = _plain_kind(info)


def _has_struct(info: Any) -> bool:
    if isinstance(info, inspect.Metadata):
        return _has_struct(info.type)
    if isinstance(info, inspect.UnionType):
        return any(map(_has_struct, info.types))
    return isinstance(info, inspect.StructType)


def _plain_kind(info: Any) -> str:
    """Say what a type without a description allows."""
    if isinstance(info, inspect.LiteralType):
        return ", ".join(msgspec.json.encode(value).decode() for value in info.values)
    name = type(info).__name__.removesuffix("Type").lower()
    return _KINDS.get({"dict": "object"}.get(name, name), "what the OpenAPI document says")
