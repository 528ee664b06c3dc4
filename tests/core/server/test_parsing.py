"""Whatever bytes come, a body or one short error that names a field comes out."""

from __future__ import annotations

import gc
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import RequestError
from quire.request import SamplingParams
from quire.server.protocol.chat import ChatCompletionRequest
from quire.server.protocol.completions import CompletionRequest
from quire.server.protocol.parsing import parse
from quire.server.protocol.responses import ResponsesRequest, to_messages
from quire.server.protocol.tokens import DetokenizeRequest, TokenizeRequest

KINDS: list[type[msgspec.Struct]] = [
    *(CompletionRequest, ChatCompletionRequest, ResponsesRequest),
    *(TokenizeRequest, DetokenizeRequest),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({name for kind in KINDS for name in kind.__struct_encode_fields__})


def parse_or_refuse(data: bytes, kind: type[msgspec.Struct]) -> msgspec.Struct | None:
    try:
        return parse(data, kind)
    except RequestError as error:
        if len(str(error)) > 1000:
            raise AssertionError("an error echoes its input") from error
        return None


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs"])
def test_what_a_template_is_told_is_bounded(field: str) -> None:
    many: dict[str, Any] = {"a": [{"b": 1}] * 40_000}
    told = [{"type": "function", "function": {"name": "f", "parameters": many}}]
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    asked = parse(
        json.dumps({**body, field: told if field == "tools" else many}).encode(),
        ChatCompletionRequest,
    )

    with pytest.raises(RequestError, match=field):
        asked.template_options()


def test_large_body_leaves_the_collector_on() -> None:
    parse_or_refuse(b'{"prompt":[' + b"[1]," * 50_000 + b"[1]]}", CompletionRequest)

    assert gc.isenabled()


@given(st.binary() | st.text().map(str.encode), st.sampled_from(KINDS))
def test_any_bytes_are_a_body_or_one_error(data: bytes, kind: type[msgspec.Struct]) -> None:
    parse_or_refuse(data, kind)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.sampled_from(KINDS))
def test_any_values_give_parameters_or_one_error(
    fields: dict[str, Any], kind: type[msgspec.Struct]
) -> None:
    base = {"model": "m", "prompt": "a", "input": "a", "tokens": [1]}
    base["messages"] = [{"role": "user", "content": "a"}]  # type: ignore[assignment]
    own = {k: v for k, v in base.items() if k in kind.__struct_encode_fields__}
    body = parse_or_refuse(json.dumps({**own, **fields}).encode(), kind)

    if isinstance(body, CompletionRequest | ChatCompletionRequest | ResponsesRequest):
        try:
            assert isinstance(body.sampling_params({}), SamplingParams)
        except RequestError as error:
            if error.parameter is None:
                raise AssertionError("an error names no field") from error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"temprature": 1},
            "unknown field 'temprature'. Did you mean 'temperature'? Leave it out.",
        ),
        ({"temperature": "hot"}, 'temperature is "hot"; allowed: '),
        ({"n": 0}, "n is 0; allowed: "),
        (
            {"prompt_embeds": "AAAA"},
            "prompt_embeds is not supported by this version of Quire; leave it out.",
        ),
        ({"max_tokens": -1}, "max_tokens is -1; allowed: "),
        ({"prompt": [-1]}, "prompt[0] is out of range; allowed: a text, texts, token ids from 0"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0] is a text; allowed: "),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(
    fields: dict[str, Any], message: str
) -> None:
    data = json.dumps({"model": "m", "prompt": "a", **fields}).encode()

    with pytest.raises(RequestError) as caught:
        parse(data, CompletionRequest)

    assert str(caught.value).startswith(message)
    assert caught.value.parameter == next(iter(fields))


def test_checkpoints_defaults_give_way_to_the_body() -> None:
    data = b'{"model": "m", "prompt": "a", "temperature": 0.25}'
    defaults = {"temperature": 0.7, "top_p": 0.9}

    params = parse(data, CompletionRequest).sampling_params(defaults)

    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.9, 16)


def test_bans_and_arguments_of_a_body_become_parameters() -> None:
    fields = {
        "allowed_token_ids": [1, 2],
        "forbidden_token_ids": [3],
        "bad_words": ["x"],
        "truncate_prompt_tokens": -1,
        "spaces_between_special_tokens": False,
        "n": 2,
        "best_of": 3,
        "extra_args": {"dry": {"base": 2}},
    }
    data = json.dumps({"model": "m", "prompt": "a", **fields}).encode()

    params = parse(data, CompletionRequest).sampling_params({})

    want = SamplingParams(**{**fields, "max_tokens": 16})  # type: ignore[arg-type]
    assert params == want


def test_arguments_come_by_vllms_name_too() -> None:
    data = b'{"model": "m", "prompt": "a", "vllm_xargs": {"dry": {"base": 2}}}'

    params = parse(data, CompletionRequest).sampling_params({})

    assert params.extra_args == {"dry": {"base": 2}}


def test_items_of_a_response_become_chat_messages() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "d", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]
    data = json.dumps({"model": "m", "input": items, "instructions": "be brief"}).encode()

    messages = to_messages(parse(data, ResponsesRequest))

    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["c", "d"]


@pytest.mark.parametrize(
    "data",
    [
        b'{"prompt":[' + b"[5]," * 300_000 + b"[5]]}",
        b'{"messages":[' + b'{"role":"user"},' * 70_000 + b"{}]}",
        b"[" * 1_100_000,
        b'{"prompt":"' + b"{" * 1_100_000 + b'"}',
    ],
    ids=["lists", "objects", "nested", "in a text"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_more_containers_than_can_be_made_quickly_are_refused(
    data: bytes, kind: type[msgspec.Struct]
) -> None:
    with pytest.raises(RequestError, match="at most 65536"):
        parse(data, kind)


def test_more_keys_than_any_field_may_have_are_refused() -> None:
    pairs = b",".join(b'"%d":1' % i for i in range(300_000))

    with pytest.raises(RequestError, match="300002 keys"):
        parse(b'{"model":"demo","metadata":{' + pairs + b"}}", ChatCompletionRequest)


@pytest.mark.parametrize("half", [b"\\ud83d", b"\\ude00"])
@pytest.mark.parametrize("first", [True, False])
def test_half_a_surrogate_pair_is_found_at_either_end_of_a_large_text(
    half: bytes, first: bool
) -> None:
    pairs = b"\\ud83d\\ude00" * 20_000
    text = half + b"x" + pairs if first else pairs + half

    with pytest.raises(RequestError, match="half a surrogate pair"):
        parse(b'{"model":"demo","prompt":"' + text + b'"}', CompletionRequest)
