"""Events as the clients' accumulators read them."""

from __future__ import annotations

import json
from typing import Any

from attrs import define
from hypothesis import given
from hypothesis import strategies as st

from quire.request import Logprob
from quire.server.answer_logprobs import LOWEST, CompletionLogprobs, chat_logprobs
from quire.server.answers import AnswerOptions, ChatAnswers, CompletionAnswers
from quire.server.generation import Usage
from quire.text.output_processor import Delta

TEXTS = st.lists(st.text(max_size=4), min_size=1, max_size=6)


@define
class Two:
    """A generation of one prompt and two sequences."""

    streams: tuple[object, ...] = (object(),)
    n: int = 2


def options(**other: Any) -> AnswerOptions:
    return AnswerOptions(
        model="m",
        token_bytes=lambda i: b"\xc3" if i == 1 else b"t%d" % i,
        fingerprint="fp",
        **other,
    )


def deltas_of(index: int, texts: list[str], reason: str = "stop") -> list[Delta]:
    last = len(texts) - 1
    return [
        Delta(
            index=index,
            text=text,
            token_ids=[number],
            logprobs=None,
            finish_reason=reason if number == last else None,
            stop_reason=None,
            error=None,
        )
        for number, text in enumerate(texts)
    ]


def events(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n") or not data
    lines = data.decode().split("\n\n")[:-1]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


@given(TEXTS, TEXTS)
def test_chat_chunks_add_up(first: list[str], second: list[str]) -> None:
    answers = ChatAnswers(options(include_usage=True))
    data = answers.begin(Two())  # type: ignore[arg-type]
    for index, texts in enumerate((first, second)):
        data += b"".join(answers.pieces(index, delta) for delta in deltas_of(index, texts))
    data += answers.end(Usage(prompt_tokens=3, completion_tokens=4))

    assert data.endswith(b"data: [DONE]\n\n")
    *chunks, last = events(data)
    assert [chunk["choices"][0]["index"] for chunk in chunks[:2]] == [0, 1]
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 7)
    for index, texts in enumerate((first, second)):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == "".join(texts)
        assert sum("role" in c["delta"] for c in own) == 1
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["stop"]
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, last]}) == 1


@given(TEXTS)
def test_completion_chunks_add_up_with_usage_each_time(texts: list[str]) -> None:
    answers = CompletionAnswers(
        options(include_usage=True, continuous_usage=True), lambda stream: "prompt"
    )
    usage = Usage(prompt_tokens=3)
    data = b""
    for delta in deltas_of(0, texts, "length"):
        usage.completion_tokens += 1
        data += answers.with_usage(answers.pieces(0, delta), usage)

    chunks = events(data)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "".join(texts)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == len(texts)


def test_ids_without_text_are_told_of_where_they_are_wanted() -> None:
    silent = deltas_of(0, ["a", ""])
    quiet = CompletionAnswers(options(), lambda stream: "")
    telling = CompletionAnswers(options(token_ids=True), lambda stream: "")

    without = events(b"".join(quiet.pieces(0, delta) for delta in silent))
    with_ids = events(b"".join(telling.pieces(0, delta) for delta in silent))

    assert len(without) == 2
    assert [i for e in with_ids for i in e["choices"][0].get("token_ids", ())] == [0, 1]


def test_chat_logprobs_put_the_chosen_token_first_and_give_bytes() -> None:
    entry = {1: Logprob(-2.0, 2), 7: Logprob(-0.5, 1), 9: Logprob(float("-inf"), 3)}

    (found,) = chat_logprobs([entry], 3, options().token_bytes)["content"]

    assert (found["logprob"], found["bytes"]) == (-2.0, [0xC3])
    assert [top["token"] for top in found["top_logprobs"]] == [
        "t7",
        "\N{REPLACEMENT CHARACTER}",
        "t9",
    ]
    assert found["top_logprobs"][-1]["logprob"] == LOWEST
    json.dumps(found, allow_nan=False)


def test_offsets_of_completion_logprobs_count_on() -> None:
    writer = CompletionLogprobs(1, options().token_bytes)

    first = writer.add([10, 11], [None, {11: Logprob(-1.0, 1)}])
    second = writer.add([12], [{12: Logprob(-3.0, 2), 13: Logprob(-1.0, 1)}])

    assert first["token_logprobs"] == [None, -1.0]
    assert first["top_logprobs"][0] is None
    assert (first["text_offset"], second["text_offset"]) == ([0, 3], [6])
    assert second["top_logprobs"] == [{"t13": -1.0, "t12": -3.0}]
