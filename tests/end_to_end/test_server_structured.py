"""OpenAI's client gets answers of the form that it asked for, or a 400 that says why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field
from serving import Server, serving

TEXT = "A large latte, please."


class Order(BaseModel):
    """What the client's `.parse` makes a strict schema of."""

    size: Literal["small", "large"]
    drinks: Annotated[list[Literal["latte", "mocha", "espresso"]], Field(max_length=2)]
    to_go: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none")


MESSAGES: Any = [{"role": "user", "content": TEXT}]


def test_parse_gives_an_object_of_the_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Order, temperature=0.5, seed=1
    )

    assert isinstance(answer.choices[0].message.parsed, Order)
    assert answer.choices[0].finish_reason == "stop"


def test_responses_parse_gives_an_object_of_the_class(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model="demo", input=TEXT, text_format=Order, temperature=0.5, extra_body={"seed": 1}
    )

    assert isinstance(answer.output_parsed, Order)
    assert answer.text.format.type == "json_schema"


def test_a_stream_keeps_to_the_schema(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, response_format=Order, temperature=0.5, seed=2
    ) as stream:
        final = stream.get_final_completion()

    assert isinstance(final.choices[0].message.parsed, Order)


CONTENT = {"type": "regex", "pattern": '"x"'}
TAG = {"type": "tag", "begin": "<f>", "content": CONTENT, "end": "</f>"}


def test_a_structural_tag_leaves_text_free_up_to_its_trigger(server: Server) -> None:
    """The demo answers "Hi" with "Hi, what can I get for you today?"."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}

    def answer(trigger: str) -> str:
        structure = {"begin": trigger + "<f=a>", "schema": {"enum": [5]}, "end": "</f>"}
        tag = {"type": "structural_tag", "structures": [structure], "triggers": [trigger]}
        asked = {**body, "response_format": tag, "max_tokens": 40}
        found = httpx.post(f"{server.url}/v1/chat/completions", json=asked).json()
        return str(found["choices"][0]["message"]["content"])

    assert answer("never") == "Hi, what can I get for you today?"
    assert re.match(r"Hi, what can I get<f=a>\s*5\s*</f>", answer("get"))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_json": {"enum": ["x", 5]}}, '"x"|5'),
        ({"guided_json": '{"const": true}'}, "true"),
        ({"guided_grammar": 'start: "a" | "b" "c"'}, "a|bc"),
        ({"guided_grammar": 'root ::= "a" | b\nb ::= "bc"'}, "a|bc"),
        ({"structural_tag": {"format": TAG}}, '<f>"x"</f>'),
        ({"structured_outputs": {"structural_tag": json.dumps({"format": TAG})}}, '<f>"x"</f>'),
        ({"structured_outputs": {"regex": "q+"}, "max_tokens": 30, "temperature": 0.1}, "q+"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_fields_of_vllms_clients_are_honoured(
    server: Server, fields: dict[str, Any], pattern: str, path: str
) -> None:
    given = {
        "completions": {"prompt": TEXT},
        "chat/completions": {"messages": MESSAGES},
        "responses": {"input": TEXT},
    }[path]
    fields = dict(fields)
    if path == "responses" and "max_tokens" in fields:
        fields["max_output_tokens"] = fields.pop("max_tokens")

    answer = httpx.post(f"{server.url}/v1/{path}", json={"model": "demo", **given, **fields})

    assert answer.status_code == 200, answer.text
    found = answer.json()
    if path == "responses":
        text = found["output"][0]["content"][0]["text"]
    else:
        choice = found["choices"][0]
        text = choice["text"] if path == "completions" else choice["message"]["content"]
    assert re.fullmatch(pattern, text)


def test_json_object_gives_an_object(server: Server) -> None:
    body = {"model": "demo", "messages": MESSAGES, "response_format": {"type": "json_object"}}

    for seed in range(4):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={**body, "seed": seed, "max_tokens": 300, "temperature": 0.3},
            timeout=60,
        ).json()["choices"][0]
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["message"]["content"]), dict)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"uniqueItems": True}}}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": SCHEMA}, "response_format", "uniqueItems"),
        ({"guided_json": {"type": "string", "format": "zzz"}}, "guided_json", "zzz"),
        ({"guided_json": {"items": []}}, "guided_json", "prefixItems"),
        ({"guided_regex": "(?<=a)b"}, "guided_regex", "look"),
        ({"guided_grammar": 'start: "a" start'}, "guided_grammar", "never ends"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex"),
        ({"guided_regex": "a", "min_tokens": 3}, "guided_regex", "min_tokens"),
        ({"response_format": {"type": "json_object"}, "stop": ["x"]}, "response_format", "stop"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "no schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structures and"),
        ({"response_format": {"type": "text", "triggers": []}}, "response_format", "triggers"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar", "names 'x', which is no rule"),
        ({"structured_outputs": {"jason": {}}}, "structured_outputs", "jason"),
        ({"guided_json": {"enum": ["x" * 300_000]}}, "guided_json", "262144"),
        ({"guided_regex": "[ab]+", "allowed_token_ids": [5]}, "guided_regex", "contradicts itself"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(
    server: Server, fields: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": "demo", "messages": MESSAGES, **fields}

    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert said in error["message"]


def test_a_form_that_other_parameters_leave_nothing_later_is_a_400(server: Server) -> None:
    body = {"model": "demo", "prompt": TEXT, "guided_choice": ["ab", "ac"], "bad_words": ["b", "c"]}

    answer = httpx.post(f"{server.url}/v1/completions", json=body)

    assert answer.status_code == 400, answer.text
    assert "bad_words" in answer.json()["error"]["message"]
