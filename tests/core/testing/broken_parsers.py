"""Parsers with one mistake each, around ones that are right."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from quire.interfaces.answer_parsing import (
    CallArguments,
    CallForm,
    CallStart,
    Content,
    Piece,
    Reasoning,
    ReasoningParser,
    ThoughtsForm,
    ToolCallParser,
)

BEGIN, END = "<call>", "</call>"


class Plain(ToolCallParser):
    """Reads `<call>name:{..}</call>` at the end of an answer, when all of it is there."""

    call_form = CallForm(
        before_name=BEGIN, after_name=":", ends=(END,), separator="", trigger=BEGIN
    )

    def __init__(self, tool_names: Collection[str] | None = None) -> None:
        self.names = tool_names
        self.text = ""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        self.text += text
        return []

    def finish(self) -> list[Piece]:
        before, *calls = self.text.split(BEGIN)
        read = [self.read(call) for call in calls]
        if not calls or any(one is None for one in read):
            return [Content(self.text)] if self.text else []
        found: list[Piece] = [Content(before.strip())]
        for index, (name, arguments) in enumerate(one for one in read if one is not None):
            found += [CallStart(index, name), CallArguments(index, arguments)]
        return found

    def read(self, call: str) -> tuple[str, str] | None:
        name, colon, rest = call.partition(":")
        if not colon or not rest.endswith(END) or not self.offers(name):
            return None
        try:
            value = json.loads(rest.removesuffix(END))
        except ValueError:
            return None
        return (name, json.dumps(value)) if isinstance(value, dict) else None

    def offers(self, name: str) -> bool:
        return self.names is None or name in self.names


class SaysAtOnce(Plain):
    """Does not wait for a mark that is cut."""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        if BEGIN in self.text or BEGIN in text:
            return super().push(text)
        return [Content(text)] if text else []


class OffersAll(Plain):
    def offers(self, name: str) -> bool:
        return True


class OffersNothingToNobody(Plain):
    def offers(self, name: str) -> bool:
        return name in (self.names or ())


class Raises(Plain):
    def read(self, call: str) -> tuple[str, str] | None:
        name, rest = call.split(":", 1)
        return name, json.dumps(json.loads(rest.removesuffix(END)))


class CountsFromOne(Plain):
    def finish(self) -> list[Piece]:
        def moved(piece: Piece) -> Piece:
            return CallStart(piece.index + 1, piece.name) if type(piece) is CallStart else piece

        return [moved(piece) for piece in super().finish()]


class DropsText(Plain):
    def finish(self) -> list[Piece]:
        found = super().finish()
        has_calls = any(isinstance(piece, CallStart) for piece in found)
        return [p for p in found if not (has_calls and isinstance(p, Content))]


class TakesAnyValue(Plain):
    def read(self, call: str) -> tuple[str, str] | None:
        name, colon, rest = call.partition(":")
        found = colon and rest.endswith(END) and self.offers(name)
        return (name, rest.removesuffix(END)) if found else None


class Shares(Plain):
    """Keeps the text of all answers in one place."""

    shared: ClassVar[dict[str, str]] = {}

    def __init__(self, tool_names: Collection[str] | None = None) -> None:
        super().__init__(tool_names)
        Shares.shared["text"] = ""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        Shares.shared["text"] += text
        self.text = Shares.shared["text"]
        return []


class Thoughts(ReasoningParser):
    """Reads `(thoughts) answer`, when all of it is there."""

    @classmethod
    def thoughts_form(cls, prompt: str) -> ThoughtsForm | None:
        return ThoughtsForm(begin="((", end="))", is_optional=True)

    def __init__(self, prompt: str = "") -> None:
        self.text = ""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Reasoning | Content]:
        self.text += text
        return []

    def finish(self) -> list[Reasoning | Content]:
        thoughts, mark, after = self.text.removeprefix("((").partition("))")
        if not self.text.startswith("((") or not mark:
            return [Content(self.text)]
        return [Reasoning(thoughts.strip()), Content(after.lstrip())]


class LosesTheEnd(Thoughts):
    def finish(self) -> list[Reasoning | Content]:
        return super().finish()[:1]


class ThinksAlways(Thoughts):
    def finish(self) -> list[Reasoning | Content]:
        thoughts, _, after = self.text.removeprefix("((").partition("))")
        return [Reasoning(thoughts), Content(after)]


class CutsThoughts(Thoughts):
    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Reasoning | Content]:
        if self.text or text.startswith("(("):
            return super().push(text)
        return [Content(text)]


BROKEN: dict[type[Any], tuple[str, str]] = {
    SaysAtOnce: ("cuts", "cut into"),
    OffersAll: ("offer|pieces", "not on offer"),
    OffersNothingToNobody: ("offer", "made without names"),
    Raises: ("cuts", "raises ValueError|raises JSONDecodeError"),
    CountsFromOne: ("pieces|calls|answers apart|cuts", "is call 0"),
    DropsText: ("calls", "text around the calls"),
    TakesAnyValue: ("pieces", "no JSON object"),
    Shares: ("answers apart", "beside another answer"),
    LosesTheEnd: ("thoughts", "content"),
    ThinksAlways: ("thoughts", "optional"),
    CutsThoughts: ("cuts", "cut into"),
}
