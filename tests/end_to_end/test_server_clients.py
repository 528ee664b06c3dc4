"""Clients that others wrote, unchanged, against `quire serve demo` on a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import Server, serving

TEXT = "A large latte, please."


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--api-key", "secret") as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="secret")
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": TEXT}], temperature=0, max_tokens=12
    )
    return answer.choices[0].message.content or ""


def test_langchain(server: Server, expected: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model="demo",
        base_url=server.url + "/v1",
        api_key="secret",  # type: ignore[arg-type]
        temperature=0,
        max_tokens=12,  # type: ignore[call-arg]
    )

    assert chat.invoke(TEXT).content == expected
    assert "".join(str(piece.content) for piece in chat.stream(TEXT)) == expected
    assert asyncio.run(chat.ainvoke(TEXT)).content == expected
    assert [answer.content for answer in chat.batch([TEXT] * 3)] == [expected] * 3
    tool = {"name": "order", "description": "order a drink", "parameters": {"type": "object"}}
    with_tools = chat.bind_tools([{"type": "function", "function": tool}]).invoke(TEXT)
    assert with_tools.usage_metadata["output_tokens"] > 0


def test_litellm(server: Server, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    options: dict[str, Any] = {
        "model": "openai/demo",
        "api_base": server.url + "/v1",
        "api_key": "secret",
        "messages": [{"role": "user", "content": TEXT}],
        "temperature": 0,
        "max_tokens": 12,
    }

    assert litellm.completion(**options).choices[0].message.content == expected
    pieces = litellm.completion(**options, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    answer = asyncio.run(litellm.acompletion(**options))
    assert answer.usage.completion_tokens > 0
    del options["messages"]
    options["model"] = "text-completion-openai/demo"
    text = litellm.text_completion(**options, prompt="I want")
    assert text.choices[0].text


CHOICE_TASK = """
task: orders
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXT_TASK = """
task: replies
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def test_lm_eval(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    from quire_models import demo

    rows = [
        {"question": "I want a", "choices": [" latte", " zebra zebra"], "answer": 0},
        {"question": "Can I get a", "choices": [" qqq xyz", " cappuccino"], "answer": 1},
    ]
    data = tmp_path / "orders.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("orders", CHOICE_TASK), ("replies", TEXT_TASK)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(data)))

    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "demo",
            "base_url": server.url + "/v1/completions",
            "tokenizer": str(Path(demo.__file__).parent / "model"),
            "max_length": 512,
        },
        tasks=["orders", "replies"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )

    assert results is not None
    assert results["results"]["orders"]["acc,none"] == 1.0
    assert results["n-samples"]["replies"]["effective"] == 2


def test_streamed_response_ends_with_a_typed_error() -> None:
    with serving() as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        asked = {"model": "demo", "input": "Hi", "ignore_eos": True, "stream": True}
        url = server.url + "/v1/responses"
        with httpx.stream("POST", url, json=asked, timeout=60) as answer:
            events = client.responses.create(
                model="demo", input="Hi", stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(events))
            os.kill(server.engine_pid(), signal.SIGKILL)

            with pytest.raises(openai.APIError, match="SIGKILL"):
                list(events)
            text = "".join(answer.iter_text())

    name, _, data = text.strip().rpartition("\n\n")[2].partition("\ndata: ")
    found = json.loads(data)
    assert (name, found["type"], found["code"]) == ("event: error", "error", "engine_dead")
    assert found["error"]["message"] == found["message"]
    assert found["sequence_number"] == text.count("event: ") - 1
