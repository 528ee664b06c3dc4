"""Requests that must be refused, each with its exact status, field and code.

(name, path, body, status, param, code). Bodies of bytes are sent as they are; other bodies as JSON.
"""

from __future__ import annotations

import json
from typing import Any

C, H = "/v1/completions", "/v1/chat/completions"
T, D, R = "/tokenize", "/detokenize", "/v1/responses"
Case = tuple[str, str, Any, int, str | None, str | None]
TOO_LONG = "context_length_exceeded"


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "Hi", "max_tokens": 2, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        **fields,
    }


def message(**fields: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "Hi", **fields}])


def response(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "input": "Hi", "max_output_tokens": 2, **fields}


def raw(text: str) -> bytes:
    return ('{"model":"demo","prompt":"Hi",' + text + "}").encode()


NOT_JSON: list[Case] = [
    (f"body {data[:12]!r}", path, data, 400, None, None)
    for path in (C, H)
    for data in (b"", b"{not json", b"[1,2]", b"null", b"42", b'"text"')
] + [
    ("more after the end", C, raw('"n":1') + b" x", 400, None, None),
    ("bytes that are no UTF-8", C, b'{"model":"demo","prompt":"\xff\xfe"}', 400, None, None),
    ("half a surrogate pair", C, b'{"model":"demo","prompt":"\\ud83d"}', 400, "prompt", None),
    ("deep lists", C, raw('"stop":' + "[" * 100_000), 400, "stop", None),
    ("deep lists in messages", H, b'{"messages":' + b"[" * 100_000 + b"}", 400, "messages", None),
    ("unknown deep field", C, raw('"zzz":' + '{"a":' * 50_000), 400, "zzz", None),
    ("duplicate end", C, raw('"n":1}'), 400, None, None),
]
NOT_FINITE: list[Case] = [
    (f"{name} {value}", C, raw(f'"{name}":{value}'), 400, name, None)
    for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")
    for value in ("NaN", "Infinity", "1e999")
] + [
    ("bias NaN", C, raw('"logit_bias":{"5":NaN}'), 400, "logit_bias", None),
    ("bias 1e999", C, raw('"logit_bias":{"5":1e999}'), 400, "logit_bias", None),
    ("max_tokens of 400 digits", C, raw(f'"max_tokens":{"9" * 400}'), 400, "max_tokens", None),
]
# Field, value: refused on both routes, naming the field.
FIELDS: list[tuple[str, Any]] = [
    *(("max_tokens", v) for v in (-1, 1.5, "x", "4", 2.5, True, [], -(2**63), 2**63, 10**9)),
    *(("temperature", v) for v in (-1, "hot", True, 1e9, [], {})),
    *(("top_p", v) for v in (0, 1.1, -0.5, "x", True)),
    *(("top_k", v) for v in (-2, 1.5, "x", True)),
    *(("min_p", v) for v in (2, -0.1, "x")),
    *(("n", v) for v in (0, -1, "two", 17000, 2000, 129, 1.5, True)),
    *(("min_tokens", v) for v in (-1, 3, "x", 1.5)),
    *(("stop", v) for v in ("", ["a", ""], 5, ["a", "b", "c", "d", "e"], [5], {}, "x" * 2000)),
    *(("stop_token_ids", v) for v in ([-5], [10**6], [2**70], [True], ["5"], 5, [1] * 100_000)),
    *(("logit_bias", v) for v in ({"a": 1}, {"-1": 1}, [1], {"5": "x"}, {"5": None})),
    *(("seed", v) for v in (1.5, "x", 2**64 - 1, 2**70, True)),
    *(("ignore_eos", v) for v in (1, "yes")),
    *(("stream", v) for v in ("yes", 1)),
    *(("stream_options", v) for v in ({"include_usage": True}, "x", {"zzz": 1})),
    *(("priority", v) for v in (2**70, 5, "high", 1.5)),
    *(("cache_salt", v) for v in ("", 5, "x" * 129)),
    *(("user", v) for v in (5, [])),
    *(("skip_special_tokens", v) for v in (0, "no")),
    *(("repetition_penalty", v) for v in (0, 1e-30, 1e30, -1, "x")),
    *(("frequency_penalty", v) for v in (2.1, -2.1, "x")),
    *(("presence_penalty", v) for v in (2.1, True)),
    *(("prompt_logprobs", v) for v in (10**6, -1, True)),
    *(("request_id", v) for v in ("", "x" * 100_000, 5, "a\nb")),
    *(("truncate_prompt_tokens", v) for v in (0, -2, 10**6)),
    *(("bad_words", v) for v in ([""], ["x"] * 10_000)),
    *(("allowed_token_ids", v) for v in ([10**6], [-1])),
    ("logit_bias", {"5": 1e9}),
    ("logit_bias", {"4096": 1}),
    ("kv_transfer_params", {"tp_size": 8}),
    ("best_of", 10**6),
    ("suffix", "end"),
    *(("use_beam_search", v) for v in (1, "x")),
    *(("length_penalty", v) for v in (2, -1.5, 11, "x")),
    *(("early_stopping", v) for v in (True, "never", "often", 1)),
    ("prompt_embeds", "AAAA"),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [4096]),
    ("forbidden_token_ids", [4096]),
    ("forbidden_token_ids", list(range(4096))),
    ("bad_words", ["  "]),
    ("bad_words", "x"),
    ("bad_words", ["x" * 300]),
    ("spaces_between_special_tokens", "no"),
    ("extra_args", {"watermark": {}}),
    ("extra_args", [5]),
    ("guided_json", {"type": "array", "uniqueItems": True}),
    ("guided_json", 5),
    ("guided_regex", "(("),
    ("guided_regex", "x" * 100_000),
    ("guided_choice", ["a", ""]),
    ("guided_choice", []),
    ("guided_grammar", "root ::= 'a'"),
    ("guided_grammar", 'start: "a" start'),
    ("structured_outputs", {}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_object", "zzz": 1}),
    ("functions", [{"name": "f"}]),
    ("audio", {"voice": "a"}),
    ("chat_template", "{{ ''.__class__ }}"),
    ("zzz", 1),
    ("x" * 1_000_000, 1),
]
BOTH: list[Case] = [
    (f"{path} {name[:20]}={str(value)[:20]}", path, make(**{name: value}), 400, name, None)
    for path, make in ((C, completion), (H, chat))
    for name, value in FIELDS
]
MODELS: list[Case] = [
    (f"{path} model {str(value)[:12]!r}", path, make(model=value), status, "model", code)
    for path, make in ((C, completion), (H, chat))
    for value, status, code in (
        ("nope", 404, "model_not_found"),
        ("", 400, None),
        ("x" * 1_000_000, 404, "model_not_found"),
        (5, 400, None),
        (None, 400, None),
    )
] + [("no model", C, {"prompt": "Hi"}, 400, "model", None)]
PROMPTS: list[Case] = [
    (f"prompt {str(value)[:24]}", C, completion(prompt=value), 400, "prompt", code)
    for value, code in (
        (None, None),
        ("", None),
        ([], None),
        ([[]], None),
        (["", ""], None),
        (5, None),
        ({}, None),
        ([True, False], None),
        ([1, "a"], None),
        ([[1], "a"], None),
        ([[True]], None),
        ([-1], None),
        ([4096], None),
        ([2**40], None),
        ([1.5], None),
        ([-1] * 100_000, None),
        (["a"] * 129, None),
        ([5] * 2048, TOO_LONG),
        ("a " * 500_000, TOO_LONG),
    )
] + [
    ("no prompt", C, {"model": "demo"}, 400, "prompt", None),
    (
        "prompt_logprobs streamed",
        C,
        completion(prompt_logprobs=1, stream=True),
        400,
        "prompt_logprobs",
        None,
    ),
    ("best_of below n", C, completion(best_of=1, n=2), 400, "best_of", None),
    ("best_of streamed", C, completion(best_of=2, stream=True), 400, "best_of", None),
    ("too many of best_of", C, completion(best_of=128, prompt=["a"] * 9), 400, "best_of", None),
    (
        "allowed and forbidden",
        C,
        completion(allowed_token_ids=[5], forbidden_token_ids=[5]),
        400,
        "forbidden_token_ids",
        None,
    ),
    (
        "arguments twice",
        C,
        completion(extra_args={"a": 1}, vllm_xargs={"a": 1}),
        400,
        "vllm_xargs",
        None,
    ),
    ("max_tokens 0 without echo", C, completion(max_tokens=0), 400, "max_tokens", None),
]
CHATS: list[Case] = (
    [
        (f"messages {str(value)[:24]}", H, chat(messages=value), 400, "messages", None)
        for value in (None, [], "hi", [5], [{}], [{"content": "x"}], [[]], [None])
    ]
    + [
        (f"message {fields}"[:60], H, message(**fields), 400, "messages", None)
        for fields in (
            {"role": "wizard"},
            {"role": 5},
            {"role": None},
            {"content": None},
            {"content": 5},
            {"content": [{"type": "picture"}]},
            {"content": [{"type": "text", "text": 5}]},
            {"content": [5]},
            {"content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]},
            {"tool_calls": [{}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{bad"}}]},
        )
    ]
    + [
        ("no messages", H, {"model": "demo"}, 400, "messages", None),
        (
            "50,000 wrong messages",
            H,
            chat(messages=[{"role": "user", "content": 5}] * 50_000),
            400,
            "messages",
            None,
        ),
        ("max_tokens twice", H, chat(max_completion_tokens=5), 400, "max_completion_tokens", None),
        (
            "max_completion_tokens 0",
            H,
            {**chat(max_completion_tokens=0), "max_tokens": None},
            400,
            "max_completion_tokens",
            None,
        ),
        ("top_logprobs alone", H, chat(top_logprobs=2), 400, "top_logprobs", None),
        ("top_logprobs 21", H, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", None),
        ("top_logprobs -1", H, chat(logprobs=True, top_logprobs=-1), 400, "top_logprobs", None),
        ("logprobs as a number", H, chat(logprobs=3), 400, "logprobs", None),
        ("tools empty", H, chat(tools=[]), 400, "tools", None),
        ("tools wrong", H, chat(tools=[5]), 400, "tools", None),
        ("tool without a name", H, chat(tools=[{"type": "function"}]), 400, "tools", None),
        ("tool_choice alone", H, chat(tool_choice="auto"), 400, "tool_choice", None),
        ("tool_choice required", H, chat(tool_choice="required"), 400, "tool_choice", None),
        (
            "tool_choice of another",
            H,
            chat(
                tools=[{"type": "function", "function": {"name": "f"}}],
                tool_choice={"type": "function", "function": {"name": "g"}},
            ),
            400,
            "tool_choice",
            None,
        ),
        (
            "reserved template variable",
            H,
            chat(chat_template_kwargs={"messages": []}),
            400,
            "chat_template_kwargs",
            None,
        ),
        (
            "odd template variable",
            H,
            chat(chat_template_kwargs={"__class__": 1}),
            400,
            "chat_template_kwargs",
            None,
        ),
        ("prompt on chat", H, chat(prompt="x"), 400, "prompt", None),
        ("messages on completions", C, completion(messages=[]), 400, "messages", None),
        ("logprobs true", C, completion(logprobs=True), 400, "logprobs", None),
        ("logprobs 1000", C, completion(logprobs=1000), 400, "logprobs", None),
        ("logprobs -2", C, completion(logprobs=-2), 400, "logprobs", None),
        ("logprobs text", C, completion(logprobs="x"), 400, "logprobs", None),
    ]
)
RESPONSES: list[Case] = [
    (f"responses {name}={str(value)[:24]}", R, response(**{name: value}), 400, name, None)
    for name, value in (
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("prompt", {"id": "p"}),
        ("background", True),
        ("truncation", "auto"),
        ("include", ["reasoning.encrypted_content"]),
        ("input", ""),
        ("input", []),
        ("input", [{"role": "wizard", "content": "x"}]),
        ("input", [{"role": "user"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image"}]}]),
        ("input", [{"type": "function_call", "name": "f"}]),
        ("input", [{"type": "reasoning"}]),
        ("max_output_tokens", 0),
        ("max_output_tokens", "x"),
        ("max_tokens", 5),
        ("prompt_logprobs", 1),
        ("tools", [{"type": "web_search"}]),
        ("tool_choice", "required"),
        ("text", {"format": {"type": "json_schema"}}),
        ("n", 2),
        ("messages", []),
        ("top_logprobs", 21),
    )
]
TOKENS: list[Case] = [
    (f"{path} {body}"[:60], path, body, 400, param, None)
    for path, body, param in (
        (T, {}, "prompt"),
        (T, {"prompt": 5}, "prompt"),
        (T, {"prompt": "a", "messages": []}, "messages"),
        (T, {"messages": []}, "messages"),
        (T, {"prompt": "a", "zzz": 1}, "zzz"),
        (D, {}, "tokens"),
        (D, {"tokens": [10**9]}, "tokens"),
        (D, {"tokens": [-1]}, "tokens"),
        (D, {"tokens": ["a"]}, "tokens"),
        (D, {"tokens": "abc"}, "tokens"),
    )
]
ALL: list[Case] = [
    *NOT_JSON, *NOT_FINITE, *BOTH, *MODELS, *PROMPTS, *CHATS, *RESPONSES, *TOKENS,
]  # fmt: skip

# Odd, and still to be served.
GOOD: list[tuple[str, str, Any]] = [
    ("NUL in a prompt", C, completion(prompt="a\0b")),
    ("tiny temperature", C, completion(temperature=1e-40)),
    ("large top_k", C, completion(top_k=2**40)),
    ("several greedy answers", C, completion(n=2, temperature=0)),
    ("max_tokens beyond the context", C, completion(max_tokens=10**7, stop=".")),
    ("every token unwanted", C, completion(logit_bias={str(i): -100 for i in range(4096)})),
    ("nulls", C, completion(**dict.fromkeys(("n", "stop", "seed", "stream", "best_of")))),
    ("best_of 1", C, completion(best_of=1)),
    ("best_of 1 streamed", C, completion(best_of=1, stream=True)),
    ("best of three", C, completion(best_of=3, n=2)),
    ("allowed tokens", C, completion(allowed_token_ids=[5, 6], forbidden_token_ids=[7])),
    ("bad words", C, completion(bad_words=["a", "the coffee"])),
    ("a long prompt cut short", C, completion(prompt=[5] * 5000, truncate_prompt_tokens=-1)),
    ("special tokens joined", C, completion(spaces_between_special_tokens=False)),
    ("no arguments", C, completion(extra_args={})),
    ("ignored fields", H, chat(user="u", store=True, metadata={}, parallel_tool_calls=False)),
    ("text format", H, chat(response_format={"type": "text"})),
    ("seed of 64 bits", C, completion(seed=2**63 - 1)),
    (
        "text parts",
        H,
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
    ),
    ("response", R, response(input=[{"role": "user", "content": "a"}], instructions="b")),
    ("response with tool_choice alone", R, response(tool_choice="auto")),
    ("developer", H, chat(messages=[{"role": "developer", "content": "a"}])),
]


def to_bytes(body: Any) -> bytes:
    """Return a body as it is sent."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()
