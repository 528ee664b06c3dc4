"""The reasoning parsers: what is thought, what is said, and that the cut changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.hooks.parser_choice import require_reasoning_parser
from quire.hooks.registry import load_plugins
from quire.interfaces.answer_parsing import Reasoning, ReasoningParser

NAMES = load_plugins().names("reasoning-parser")
PARSERS = {name: require_reasoning_parser(load_plugins(), name) for name in NAMES}


def parse(kind: type[ReasoningParser], texts: list[str], prompt: str = "") -> tuple[str, str]:
    """Return the thoughts and the content of an answer in pieces."""
    parser = kind(prompt)
    pieces = [piece for text in texts for piece in parser.push(text)] + parser.finish()
    thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    return thoughts, "".join(p.text for p in pieces if not isinstance(p, Reasoning))


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "expected"),
    [
        ("qwen3", "", "<think>\na b\n</think>\n\nHi.\n", ("a b", "Hi.\n")),
        ("qwen3", "", "Hi <think> you", ("", "Hi <think> you")),
        ("qwen3", "", " <thin", ("", " <thin")),
        ("qwen3", "x<think>\n", "a</think>Hi", ("a", "Hi")),
        ("qwen3", "x<think>\n\n</think>\n\n", "Hi", ("", "Hi")),
        ("qwen3", "", "<think>never ends", ("never ends", "")),
        ("deepseek_r1", "", "a\n\nb</think>\nHi", ("a\n\nb", "Hi")),
        ("deepseek_r1", "", "<think>a</think>Hi</think>", ("a", "Hi</think>")),
        ("deepseek_r1", "", "all of it </thi", ("all of it </thi", "")),
        ("deepseek_r1", "<think></think>", "Hi", ("", "Hi")),
    ],
)
def test_thoughts_and_content_are_told_apart(
    name: str, prompt: str, answer: str, expected: tuple[str, str]
) -> None:
    assert parse(PARSERS[name], [answer], prompt) == expected
    assert parse(PARSERS[name], list(answer), prompt) == expected


PARTS = st.sampled_from(["<think>", "</think>", "<thi", "</", "nk>", "\n", " ", "a", "ä😀", "<"])


@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None, max_examples=150)
@given(st.lists(PARTS, max_size=12), st.sampled_from(["", "<think>\n", "<think></think>"]))
def test_the_cut_of_a_text_changes_nothing(name: str, pieces: list[str], prompt: str) -> None:
    answer = "".join(pieces)

    whole = parse(PARSERS[name], [answer], prompt)

    assert parse(PARSERS[name], pieces, prompt) == whole
    assert parse(PARSERS[name], list(answer), prompt) == whole
