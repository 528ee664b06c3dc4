"""What must hold of tool-call and reasoning parsers: one function a check, which judges a case."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from attrs import Factory, define, frozen

from quire.interfaces.answer_parsing import (
    CallArguments,
    CallBroken,
    CallForm,
    CallStart,
    Content,
    Reasoning,
    ReasoningParser,
    ThoughtsForm,
    ToolCallParser,
)
from quire.testing.kit_report import Failure

TOOLS = ("get_weather", "add")
STRANGER = "nobody"
MOST_PLACES = 120


@frozen(kw_only=True)
class ParserCase:
    """An answer, its prompt (of a reasoning parser), and what a form's answer was made of."""

    answer: str
    prompt: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    before: str = ""
    after: str = ""
    seed: int = 0

    def __str__(self) -> str:
        prompt = f", after the prompt {self.prompt!r}" if self.prompt else ""
        return f"the answer {self.answer!r}{prompt}"


@define(eq=True)
class Parsed:
    """All pieces of an answer, put together as a client of a stream does."""

    content: str = ""
    thoughts: str = ""
    calls: list[list[str]] = Factory(list)  # name, text of the arguments
    broken: list[int] = Factory(list)

    def take(self, pieces: Sequence[Any]) -> None:
        """Add pieces. Raises: AssertionError for one that the contract has not at this place."""
        for piece in pieces:
            match piece:
                case Content():
                    self.content += piece.text
                case Reasoning():
                    self.thoughts += piece.text
                case CallStart():
                    assert piece.index == len(self.calls), f"{piece} is call {len(self.calls)}"
                    self.calls.append([piece.name, ""])
                case CallArguments() | CallBroken():
                    assert piece.index == len(self.calls) - 1, f"{piece} is of no call that goes on"
                    assert piece.index not in self.broken, f"{piece} comes after CallBroken"
                    if isinstance(piece, CallBroken):
                        self.broken.append(piece.index)
                    else:
                        self.calls[-1][1] += piece.text
                case _:
                    raise AssertionError(f"{piece!r} is no piece")


AnyParser = ToolCallParser | ReasoningParser
Make = Callable[[], AnyParser]


def maker(kind: type[AnyParser], case: ParserCase) -> Make:
    """Return what makes a parser for an answer."""
    if issubclass(kind, ToolCallParser):
        return lambda: kind(TOOLS)
    return lambda: kind(case.prompt)


def parse(make: Make, texts: Sequence[str]) -> Parsed:
    """Feed an answer in pieces."""
    parser, parsed = make(), Parsed()
    for text in texts:
        parsed.take(parser.push(text))
    parsed.take(parser.finish())
    return parsed


def check_cuts(kind: type[AnyParser], case: ParserCase) -> Failure | None:
    """What an answer means does not depend on where it was cut."""
    make, answer = maker(kind, case), case.answer
    whole = parse(make, [answer])
    cuts = [[answer[:place], answer[place:]] for place in range(1, len(answer))]
    cuts = cuts[:: 1 + len(cuts) // MOST_PLACES]
    for texts in ([*answer], ["", answer, ""], *cuts):
        parsed = parse(make, texts)
        if parsed != whole:
            shown = "characters" if len(texts) > 3 else " and ".join(map(repr, texts))
            what = f"cut into {shown} it means {_differs(parsed, whole)}"
            return Failure(what=what, case=case, guess="a mark is not waited for where it is cut")
    return None


def _differs(found: Parsed, whole: Parsed) -> str:
    for name in ("content", "thoughts", "calls", "broken"):
        own, other = getattr(found, name), getattr(whole, name)
        if own != other:
            return f"{name} {own!r}, and as a whole {other!r}"
    return "the same"


def check_pieces(kind: type[ToolCallParser], case: ParserCase) -> Failure | None:
    """Calls that are whole have an object as arguments; what is no call stays content."""
    parsed = parse(maker(kind, case), [case.answer])
    for index, (name, text) in enumerate(parsed.calls):
        if name not in TOOLS:
            what = f"{name!r} is called, which is not on offer ({', '.join(TOOLS)})"
            return Failure(what=what, case=case)
        if index not in parsed.broken and not _is_object(text):
            what = f"the arguments of call {index} are {text!r}, which is no JSON object"
            return Failure(what=what, case=case)
    if not parsed.calls and parsed.content != case.answer:
        what = f"there is no call, and the content is {parsed.content!r}"
        return Failure(what=what, case=case)
    return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def written(form: CallForm, calls: Sequence[tuple[str, str]], end: int) -> str:
    """Return calls of (name, arguments) as a form writes them."""
    ending = form.ends[end % len(form.ends)]
    each = [f"{form.before_name}{n}{form.after_name}{text}{ending}" for n, text in calls]
    return form.opening + form.separator.join(each) + form.closing


def check_calls(kind: type[ToolCallParser], case: ParserCase) -> Failure | None:
    """Calls that are written as `call_form` says are read, and text around them stays."""
    form = kind.call_form
    assert form is not None, "it is not checked without a form"
    text = case.before + written(form, case.calls, case.seed) + case.after
    asked = ParserCase(answer=text)
    parsed = parse(maker(kind, asked), [text])
    found = [(name, _value(arguments)) for name, arguments in parsed.calls]
    wanted = [(name, _value(arguments)) for name, arguments in case.calls]
    if found != wanted or parsed.broken:
        return Failure(what=f"the calls {wanted} are read as {found}", case=asked)
    around = _bare(case.before + case.after)
    if _bare(parsed.content) != around:
        what = f"the text around the calls is {around!r}, and the content {parsed.content!r}"
        return Failure(what=what, case=asked)
    return check_cuts(kind, asked)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return f"no JSON: {text!r}"


def _bare(text: str) -> str:
    return "".join(text.split())


def check_offer(kind: type[ToolCallParser], case: ParserCase) -> Failure | None:
    """A call of a function that is not on offer stays content; None offers any."""
    form = kind.call_form
    assert form is not None, "it is not checked without a form"
    text = written(form, [(STRANGER, arguments) for _, arguments in case.calls], case.seed)
    asked = ParserCase(answer=text)
    parsed = parse(maker(kind, asked), [text])
    if parsed.calls or parsed.content != text:
        what = f"{STRANGER!r} is not on offer; calls {parsed.calls}, content {parsed.content!r}"
        return Failure(what=what, case=asked)
    names = [name for name, _ in parse(lambda: kind(None), [text]).calls]
    if names != [STRANGER] * len(case.calls):
        what = f"made without names it offers any function, and reads calls of {names}"
        return Failure(what=what, case=asked)
    return None


def check_apart(kind: type[AnyParser], case: ParserCase) -> Failure | None:
    """Two answers that come at the same time mean what each means alone."""
    other = ParserCase(answer=case.answer[::-1] or "a", prompt=case.prompt)
    alone = [parse(maker(kind, one), [*one.answer]) for one in (case, other)]
    parsers = [maker(kind, one)() for one in (case, other)]
    found = [Parsed(), Parsed()]
    for texts in itertools.zip_longest(case.answer, other.answer, fillvalue=""):
        for parser, own, text in zip(parsers, found, texts, strict=True):
            own.take(parser.push(text))
    for parser, own in zip(parsers, found, strict=True):
        own.take(parser.finish())
    for one, own, wanted in zip((case, other), found, alone, strict=True):
        if own != wanted:
            what = f"beside another answer it means {_differs(own, wanted)}"
            return Failure(what=what, case=one, guess="parsers share what they remember")
    return None


def check_thoughts(kind: type[ReasoningParser], case: ParserCase) -> Failure | None:
    """Thoughts that are written as `thoughts_form` says are told from what follows."""
    form = kind.thoughts_form(case.prompt)
    if form is None:
        return None
    return _check_marked(kind, case, form) or _check_bare(kind, case, form)


def _check_marked(
    kind: type[ReasoningParser], case: ParserCase, form: ThoughtsForm
) -> Failure | None:
    asked = ParserCase(answer=form.begin + case.before + form.end + case.after, prompt=case.prompt)
    parsed = parse(maker(kind, asked), [asked.answer])
    wanted = (_bare(case.before), _bare(case.after))
    found = (_bare(parsed.thoughts), _bare(parsed.content))
    if found != wanted:
        what = (
            f"thoughts are {found[0]!r} for {wanted[0]!r}, content {found[1]!r} for {wanted[1]!r}"
        )
        return Failure(what=what, case=asked)
    return check_cuts(kind, asked)


def _check_bare(
    kind: type[ReasoningParser], case: ParserCase, form: ThoughtsForm
) -> Failure | None:
    if not form.is_optional:
        return None
    asked = ParserCase(answer=case.after, prompt=case.prompt)
    parsed = parse(maker(kind, asked), [asked.answer])
    if parsed.thoughts or _bare(parsed.content) != _bare(case.after):
        what = f"thoughts are optional, and an answer without marks is read as {parsed}"
        return Failure(what=what, case=asked)
    return None
