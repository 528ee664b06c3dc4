"""Every tool-call parser: what it reads, and that the cut of the text changes nothing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.hooks.parser_choice import require_tool_call_parser
from quire.hooks.registry import load_plugins
from quire.interfaces.answer_parsing import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Piece,
    ToolCallParser,
)

NAMES = load_plugins().names("tool-call-parser")
PARSERS = {name: require_tool_call_parser(load_plugins(), name) for name in NAMES}
TOOLS = ("get_weather", "add", "a.b-c")


@attrs.define
class Parsed:
    """All pieces of an answer, put together."""

    content: str = ""
    calls: list[list[Any]] = attrs.Factory(list)  # name, text of the arguments
    broken: list[int] = attrs.Factory(list)
    order: list[str] = attrs.Factory(list)


def together(pieces: Sequence[Piece]) -> Parsed:
    """Put pieces together as a client of a stream does."""
    parsed = Parsed()
    for piece in pieces:
        kind = type(piece).__name__
        if not parsed.order or parsed.order[-1] != kind:
            parsed.order.append(kind)
        if isinstance(piece, Content):
            parsed.content += piece.text
        elif isinstance(piece, CallStart):
            assert piece.index == len(parsed.calls)
            parsed.calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            assert piece.index == len(parsed.calls) - 1
            parsed.calls[piece.index][1] += piece.text
        elif isinstance(piece, CallBroken):
            parsed.broken.append(piece.index)
    return parsed


def parse(kind: type[ToolCallParser], pieces: Sequence[str], tools: Any = TOOLS) -> Parsed:
    """Feed an answer in pieces."""
    parser = kind(tools)
    found = [piece for text in pieces for piece in parser.push(text)]
    return together([*found, *parser.finish()])


def calls(parsed: Parsed) -> list[tuple[str, Any]]:
    """Return the calls with their arguments as values."""
    return [(name, json.loads(text)) for name, text in parsed.calls]


def hermes(calls: Sequence[tuple[str, str]]) -> str:
    one = '<tool_call>\n{{"name": {}, "arguments": {}}}\n</tool_call>'
    return "\n".join(one.format(json.dumps(name), text) for name, text in calls)


def llama(calls: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f'{{"name": {json.dumps(n)}, "parameters": {text}}}' for n, text in calls)


def mistral(calls: Sequence[tuple[str, str]]) -> str:
    return f"[TOOL_CALLS] [{llama(calls).replace('; {', ', {')}]".replace("parameters", "arguments")


def mistral_v11(calls: Sequence[tuple[str, str]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{text}" for name, text in calls)


def deepseek(calls: Sequence[tuple[str, str]]) -> str:
    one = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
    listed = "\n".join(one.format(name, text) for name, text in calls)
    return f"<｜tool▁calls▁begin｜>{listed}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Sequence[tuple[str, str]]) -> str:
    one = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    listed = "".join(one.format(name, text) for name, text in calls)
    return f"<｜tool▁calls▁begin｜>{listed}<｜tool▁calls▁end｜>"


def pythonic(calls: Sequence[tuple[str, str]]) -> str:
    def one(name: str, text: str) -> str:
        given = json.loads(text).items()
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in given)})"

    return f"[{', '.join(one(name, text) for name, text in calls)}]"


# The parser, how its calls are written, and whether text may stand before them.
FORMS = {
    "hermes": ("hermes", hermes, True),
    "qwen": ("qwen", hermes, True),
    "demo": ("demo", hermes, True),
    "llama3_json": ("llama3_json", llama, False),
    "mistral": ("mistral", mistral, True),
    "mistral v11": ("mistral", mistral_v11, True),
    "deepseek": ("deepseek", deepseek, True),
    "deepseek v3.1": ("deepseek", deepseek_v31, True),
    "pythonic": ("pythonic", pythonic, False),
}

# No surrogates, and nothing that a mark could begin with, which a text around calls must not have.
PLAIN = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<[{"), max_size=12)
JSON_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | JSON_TEXT | st.sampled_from(["</tool_call>", "<tool_call>", '"}}', "\\", "]", "```", ")"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z]{1,6}_", fullmatch=True), JSON, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(TOOLS[:2]), ARGUMENTS), min_size=1, max_size=3)


def cut(text: str, places: Sequence[int]) -> list[str]:
    """Cut a text at some places."""
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=60)
@given(CALLS, PLAIN, PLAIN, st.booleans(), st.lists(st.integers(0, 10**6), max_size=12))
def test_calls_are_read_however_the_text_is_cut(
    form: str,
    wanted: list[tuple[str, dict[str, Any]]],
    before: str,
    after: str,
    is_ascii: bool,
    places: list[int],
) -> None:
    name, write, may_follow_text = FORMS[form]
    before = before if may_follow_text else ""
    texts = [(n, json.dumps(arguments, ensure_ascii=is_ascii)) for n, arguments in wanted]
    answer = before + write(texts) + after

    whole = parse(PARSERS[name], [answer])

    assert calls(whole) == wanted
    assert whole.content == before.rstrip() + after.strip(";" * ("llama" in form)).lstrip()
    assert parse(PARSERS[name], cut(answer, places)) == whole
    assert parse(PARSERS[name], list(answer)) == whole


SNIPPETS = [
    *('{"name": "add", "arguments": {"x": 1}}', '{"name": "add", "parameters": {', '{"name": "ad'),
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "add",
        "add(x=1)",
        "[add(",
        "[",
        "]",
    ),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>add\n```json\n"),
    *("<｜tool▁call▁end｜>", "```", "<|python_tag|>", ";", ",", "}", '"', "\\", "\\u12", "1e", "-"),
    *(
        " ",
        "\n",
        "ä€😀",
        "nobody",
        "null",
        ")",
        "'",
        "(",
        "{",
        ":",
        '{"arguments": {}, "name":"add"',
    ),
]
ODD = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None, max_examples=150)
@given(ODD, st.lists(st.integers(0, 10**6), max_size=8))
def test_odd_answers_never_raise_and_their_cut_changes_nothing(
    name: str, answer: str, places: list[int]
) -> None:
    whole = parse(PARSERS[name], [answer])

    assert parse(PARSERS[name], cut(answer, places)) == whole
    assert parse(PARSERS[name], list(answer)) == whole
    finished = [c for i, c in enumerate(whole.calls) if i not in whole.broken]
    assert all(isinstance(json.loads(text), dict) for _, text in finished)
    if not whole.calls:
        assert whole.content == answer


MALFORMED = {
    "hermes": [
        "<tool_call>no JSON</tool_call>",
        '<tool_call>{"name": "add"',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"x": NaN}, "name": "add"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{\\"x\\": \\"\\ud800\\"}"}</tool_call>',
        "<tool_call>" + '{"a": ' * 500,
        "a < b, <tool",
    ],
    "llama3_json": ['{"name": "Bob", "age": 5}', '{"answer": 42}', "<|python_tag|>print(1)", "{}"],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS] I cannot.", "[TOOL_CALLS][1]", "[TOOL"],
    "deepseek": ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>add", "<｜tool▁calls▁end｜> a"],
    "pythonic": [
        *("[1, 2]", "[add(1)]", "[add(x=f())]", "[add(x=1)", "[nobody(x=1)]", "[add(**x)]"),
        *("[add(x=1, x=2)]", "[add(x=b'a')]", "[add(x=1e999)]", "[add(x=" + "(" * 500, "a [add()]"),
        *("[add(x='\\ud800')]", "[add(x=lambda: 1)]", "[add (x=1)]"),
    ],
}  # fmt: skip
CASES = [(name, text) for name, texts in MALFORMED.items() for text in texts]


@pytest.mark.parametrize(("name", "answer"), CASES)
def test_what_is_no_call_stays_content(name: str, answer: str) -> None:
    parsed = parse(PARSERS[name], [answer])

    if answer == "[add(x=1)":  # a call that is whole counts without the list's end
        assert calls(parsed) == [("add", {"x": 1})]
    else:
        assert (parsed.content, parsed.calls) == (answer, [])


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "add"}', ("add", {"x": 1})),
        ("hermes", '<tool_call>{"name": "add"}</tool_call>', ("add", {})),
        ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', ("add", {})),
        ("hermes", '<tool_call>{"name":"add","arguments":"{\\"x\\":1}"}', ("add", {"x": 1})),
        ("hermes", '<tool_call>{"name":"add","arguments":{}</tool_call>', ("add", {})),
        ("llama3_json", '\n<|python_tag|>{"name": "add", "parameters": {}}', ("add", {})),
        ("llama3_json", '{"type": "function", "name": "add", "parameters": {}}', ("add", {})),
        ("mistral", "[TOOL_CALLS]add[CALL_ID]abc[ARGS]{}", ("add", {})),
        ("mistral", '[TOOL_CALLS]add{"x": 1}', ("add", {"x": 1})),
        ("deepseek", "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜>", ("add", {})),
        ("pythonic", "<|python_start|>[add(x=-1, y=(True, null))]<|python_end|>",
         ("add", {"x": -1, "y": [True, None]})),
        ("pythonic", r"[add(x='\d')]", ("add", {"x": r"\d"})),
    ],
)  # fmt: skip
def test_variants_of_a_form_are_read(name: str, answer: str, expected: tuple[str, Any]) -> None:
    parsed = parse(PARSERS[name], [answer])

    assert calls(parsed) == [expected]
    assert parsed.content in ("", "</tool_call>")


def test_arguments_come_while_they_are_written() -> None:
    parser = PARSERS["hermes"](TOOLS)

    told = [
        parser.push(text)
        for text in (
            "Sure. <tool_",
            'call>{"name": "add", "arg',
            'uments": {"x": "a',
            "b\\",
            'n", "y',
        )
    ]

    assert told == [
        [Content("Sure.")],
        [],
        [CallStart(0, "add"), CallArguments(0, '{"x": "a')],
        [CallArguments(0, "b")],
        [CallArguments(0, '\\n", "y')],
    ]
    assert parser.finish() == [
        CallBroken(0, '<tool_call>{"name": "add", "arguments": {"x": "ab\\n", "y')
    ]


def test_text_between_calls_and_a_call_after_a_broken_one_are_read() -> None:
    answer = (
        'a <tool_call>{"name": "add", "arguments": {"x": oh}}</tool_call> b '
        '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    )

    parsed = parse(PARSERS["hermes"], [answer])

    assert parsed.broken == [0]
    assert parsed.calls == [["add", '{"x": '], ["add", "{}"]]
    assert parsed.content == "aoh}}</tool_call> b"


@pytest.mark.parametrize("name", PARSERS)
def test_an_answer_without_calls_is_its_content(name: str) -> None:
    parsed = parse(PARSERS[name], ["Hi", " there.\n", "\n  Well? "])

    assert parsed == Parsed(content="Hi there.\n\n  Well? ", order=["Content"])


def test_without_names_any_function_may_be_called() -> None:
    parsed = parse(PARSERS["hermes"], ['<tool_call>{"name": "x y", "arguments": {}}'], None)

    assert calls(parsed) == [("x y", {})]


def test_calls_of_mistral_have_ids_that_its_template_takes() -> None:
    parser = PARSERS["mistral"](TOOLS)

    told = parser.push(mistral([("add", "{}")] * 2))
    (given, _) = parser.push("[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{}")
    started = [piece for piece in told if isinstance(piece, CallStart)]

    assert len({start.id for start in started}) == 2
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", start.id or "") for start in started)
    assert given == CallStart(2, "add", "abcdefghi")
