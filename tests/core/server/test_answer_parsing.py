"""Thoughts and calls in answers: the same message streamed as whole, whatever the pieces."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ConfigError, RequestError
from quire.hooks.parser_choice import require_reasoning_parser, require_tool_call_parser
from quire.hooks.registry import load_plugins
from quire.request import Logprob, SamplingParams
from quire.server import answer_parsing
from quire.server.answer_parsing import Parsers, with_special_tokens
from quire.server.answers import AnswerOptions
from quire.server.generation import Usage
from quire.server.meaning_answers import MeaningAnswers
from quire.server.options import ServerOptions
from quire.server.protocol.chat import ChatCompletionRequest
from quire.server.protocol.parsing import parse
from quire.server.protocol.responses import ResponsesRequest, to_messages
from quire.server.response_items import ItemAnswers
from quire.text.output_processor import Delta

REGISTRY = load_plugins()
PARSERS = Parsers(
    reasoning=require_reasoning_parser(REGISTRY, "qwen3"),
    tool_call=require_tool_call_parser(REGISTRY, "hermes"),
    tool_names=("add", "sub"),
)
ADD = '<tool_call>\n{"name": "add", "arguments": {"x": "é \\n"}}\n</tool_call>'
SUB = '<tool_call>{"name": "sub", "arguments": {}}</tool_call>'


def options(**other: Any) -> AnswerOptions:
    return AnswerOptions(model="m", token_bytes=lambda i: b"t%d" % i, fingerprint="fp", **other)


def deltas(texts: list[str], reason: str = "stop", logprobs: Any = None) -> list[Delta]:
    return [
        Delta(
            index=0,
            text=text,
            token_ids=[number],
            finish_reason=reason if number == len(texts) - 1 else None,
            stop_reason=None,
            logprobs=logprobs and [logprobs],
        )
        for number, text in enumerate(texts)
    ]


def chunks(events: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in events.decode().split("\n\n") if "{" in line]


def streamed(parsers: Parsers, texts: list[str], reason: str = "stop") -> dict[str, Any]:
    """Return a streamed chat answer as a client puts it together."""
    answers = MeaningAnswers(options(), parsers, "prompt")
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for delta in deltas(texts, reason):
        for chunk in chunks(answers.pieces(0, delta)):
            (choice,) = chunk["choices"]
            found["content"] += choice["delta"].get("content", "")
            found["reasoning"] += choice["delta"].get("reasoning_content", "")
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    assert (call["index"], call["type"]) == (len(found["calls"]), "function")
                    found["calls"].append([call["function"]["name"], ""])
                found["calls"][call["index"]][1] += call["function"]["arguments"]
            found["finish_reason"] = choice["finish_reason"]
    return found


def stream_of(text: str, reason: str = "stop") -> Any:
    output = SimpleNamespace(
        text=text, token_ids=[1], logprobs=None, finish_reason=reason, stop_reason=None
    )
    return SimpleNamespace(output=lambda: SimpleNamespace(outputs=[output]))


def whole(parsers: Parsers, text: str, reason: str = "stop") -> dict[str, Any]:
    """Return a whole chat answer in the same form."""
    choice = MeaningAnswers(options(), parsers, "prompt").choice(0, stream_of(text, reason), 0)
    message = choice["message"]
    calls = [c["function"] for c in message.get("tool_calls", ())]
    return {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning_content", ""),
        "calls": [[call["name"], call["arguments"]] for call in calls],
        "finish_reason": choice["finish_reason"],
    }


ANSWER = f"<think>\nLet me add.\n</think>\n\nSure.\n{ADD}\n{SUB}"
EXPECTED = {
    "content": "Sure.",
    "reasoning": "Let me add.",
    "calls": [["add", '{"x": "é \\n"}'], ["sub", "{}"]],
    "finish_reason": "tool_calls",
}


@settings(deadline=None)
@given(st.lists(st.integers(0, len(ANSWER)), max_size=10))
def test_a_streamed_chat_says_what_a_whole_one_says(places: list[int]) -> None:
    ends = sorted({0, *places, len(ANSWER)})
    texts = [ANSWER[a:b] for a, b in itertools.pairwise(ends)]

    assert streamed(PARSERS, texts) == EXPECTED
    assert whole(PARSERS, ANSWER) == EXPECTED


def test_a_call_within_thoughts_is_a_thought() -> None:
    found = whole(PARSERS, f"<think>{ADD}</think>Hi")

    assert (found["content"], found["calls"]) == ("Hi", [])
    assert found["reasoning"] == ADD


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_call_that_breaks_off_is_content_in_a_whole_answer(reason: str) -> None:
    answer = SUB + '<tool_call>{"name": "add", "arguments": {"x'

    found = whole(PARSERS, answer, reason)

    assert found["calls"] == [["sub", "{}"]]
    assert found["content"] == answer.removeprefix(SUB)
    assert found["finish_reason"] == ("tool_calls" if reason == "stop" else "length")
    assert streamed(PARSERS, [answer], reason)["calls"][1] == ["add", '{"x']


def test_without_parallel_calls_the_first_is_told_alone() -> None:
    parsers = evolve(PARSERS, is_one_call=True)

    assert whole(parsers, ADD + SUB)["calls"] == EXPECTED["calls"][:1]
    assert streamed(parsers, [ADD, SUB])["calls"] == EXPECTED["calls"][:1]


def test_a_whole_answer_of_calls_alone_has_no_content_and_ids_of_its_own() -> None:
    choice = MeaningAnswers(options(), PARSERS, "").choice(0, stream_of(ADD + SUB), 0)

    message = choice["message"]
    assert message["content"] is None
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert all(call["id"].startswith("call_") for call in message["tool_calls"])


def test_log_probabilities_come_once_also_for_text_that_is_held_back() -> None:
    answers = MeaningAnswers(options(num_logprobs=0, token_ids=True), PARSERS, "")
    entry = {1: Logprob(logprob=-1.0, rank=1, decoded_token="a")}
    texts = ["<thi", "nk>", "a", "</think>", "b <tool", "_call> ", "c"]

    found = [
        chunk["choices"][0]
        for delta in deltas(texts, logprobs=entry)
        for chunk in chunks(answers.pieces(0, delta))
    ]

    told = [entry for choice in found for entry in (choice["logprobs"] or {}).get("content", ())]
    ids = [token_id for choice in found for token_id in choice.get("token_ids", ())]
    assert (len(told), ids) == (len(texts), list(range(len(texts))))


@pytest.mark.parametrize("which", ["reasoning", "tool_call"])
def test_a_parser_that_fails_leaves_the_rest_as_content(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(answer_parsing.log, "exception", logged.append)

    class Failing(getattr(PARSERS, which)):  # type: ignore[misc]
        def push(self, text: str, token_ids: Any = ()) -> Any:
            if "boom" in text:
                raise RuntimeError("a bug")
            return super().push(text, token_ids)

    found = streamed(evolve(PARSERS, **{which: Failing}), ["Hi ", "boom", " you"])

    assert found["content"].replace(" ", "") == "Hiboomyou"
    assert found["finish_reason"] == "stop"
    assert len(logged) == 1
    assert "parser failed; the rest of the answer is content" in logged[0]


def test_special_tokens_stay_in_the_text_where_a_parser_reads_them() -> None:
    mistral = Parsers(tool_call=require_tool_call_parser(REGISTRY, "mistral"))
    params = SamplingParams()

    assert with_special_tokens(params, PARSERS) is params
    assert with_special_tokens(params, mistral).skip_special_tokens is False


def events(data: bytes) -> list[Any]:
    return [json.loads(part.split("\ndata: ")[1]) for part in data.decode().split("\n\n") if part]


def test_a_streamed_response_builds_up_the_items_of_the_whole_one() -> None:
    asked = ResponsesRequest(model="m", input="Hi")
    text = ANSWER + " Done."
    answers = ItemAnswers(options(), asked, PARSERS, "")
    generation: Any = SimpleNamespace(streams=[stream_of(text)], usage=Usage())

    data = answers.begin(generation)
    data += b"".join(answers.pieces(0, delta) for delta in deltas(list(text)))
    told = events(data + answers.end(Usage()))

    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert told[-1]["response"]["output"] == done
    kinds = ["reasoning", "message", "function_call", "function_call", "message"]
    assert [item["type"] for item in done] == kinds
    assert [done[2]["name"], done[2]["arguments"]] == EXPECTED["calls"][0]
    for number, item in enumerate(done):
        texts = [e["delta"] for e in told if "delta" in e and e["output_index"] == number]
        assert "".join(texts) == (item.get("arguments") or item["content"][0]["text"])
    body = json.loads(ItemAnswers(options(), asked, PARSERS, "").whole(generation))
    assert [item["type"] for item in body["output"]] == kinds[:-1]
    assert body["output"][1]["content"][0]["text"] == "Sure.Done."


def test_items_of_a_response_are_read_again_as_one_message() -> None:
    asked = ResponsesRequest(model="m", input="Hi")
    generation: Any = SimpleNamespace(streams=[stream_of(ANSWER)], usage=Usage())
    output = json.loads(ItemAnswers(options(), asked, PARSERS, "").whole(generation))["output"]

    again = parse(json.dumps({"model": "m", "input": output}).encode(), ResponsesRequest)

    (message,) = to_messages(again)
    assert message["content"][0]["text"] == "Sure."
    assert message["reasoning_content"] == "Let me add."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add", "sub"]


def chat(*functions: dict[str, Any]) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": function} for function in functions]
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "m", "messages": messages, "tools": tools}
    return parse(json.dumps(body).encode(), ChatCompletionRequest)


def test_functions_of_one_name_are_refused() -> None:
    with pytest.raises(RequestError, match="tools names 'f' at 0 and at 2; name a function once."):
        chat({"name": "f"}, {"name": "g"}, {"name": "f"}).template_options()


def test_a_schema_that_is_too_large_is_refused() -> None:
    schema = {"type": "object", "description": "x" * 2**18}

    with pytest.raises(RequestError, match=r"tools has parameters of \d+ bytes at 0 \('f'\)"):
        chat({"name": "f", "parameters": schema}).template_options()


def test_unknown_parsers_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown tool-call parser 'herms'.*mean 'hermes'\?"):
        require_tool_call_parser(REGISTRY, "herms")
    with pytest.raises(ConfigError, match=r"unknown reasoning parser 'qwen'.*mean 'qwen3'\?"):
        require_reasoning_parser(REGISTRY, "qwen")


def test_enabling_the_automatic_choice_without_a_parser_is_refused() -> None:
    with pytest.raises(ConfigError, match="--enable-auto-tool-choice needs --tool-call-parser"):
        ServerOptions(enable_auto_tool_choice=True)
