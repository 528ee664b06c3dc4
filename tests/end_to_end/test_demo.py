"""The demo model through the whole engine, against Transformers on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams

DIALOGUES = Path(__file__).parents[1] / "data" / "coffee_orders_valid.jsonl"
NUM_PROMPTS = 20
NUM_NEW = 200


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The demo in float32, which makes greedy tokens comparable."""
    return LLM(
        "demo",
        dtype="float32",
        num_threads=1,
        max_num_seqs=NUM_PROMPTS,
        kv_cache_memory_bytes=256 << 20,
    )


def first_messages() -> list[str]:
    """The customers' first messages of the first validation dialogues."""
    lines = DIALOGUES.read_text().splitlines()[:NUM_PROMPTS]
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def greedy(oracle: Any, prompt: list[int]) -> list[int]:
    """Return what Transformers generates, end tokens ignored."""
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def test_the_first_200_greedy_tokens_equal_transformers(llm: LLM) -> None:
    from transformers import AutoModelForCausalLM

    folder = llm.frontend.prepared.folder
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    conversations = [[{"role": "user", "content": text}] for text in first_messages()]

    outputs = llm.chat(conversations, params, use_tqdm=False)

    found = [output.outputs[0].token_ids for output in outputs]
    assert found == [greedy(oracle, output.prompt_token_ids) for output in outputs]


def test_the_demo_answers_a_greeting_in_words(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=80)

    (output,) = llm.chat([{"role": "user", "content": "Hi, can I get a latte?"}], params)

    assert output.outputs[0].finish_reason == "stop"
    assert len(output.outputs[0].text.split()) >= 3


def test_the_demo_calls_a_tool_that_the_prompt_offers(llm: LLM) -> None:
    import quire_models.demo

    tools = json.loads(Path(quire_models.demo.__file__).with_name("tools.json").read_text())
    params = SamplingParams(temperature=0, max_tokens=120, skip_special_tokens=False)
    asked = [{"role": "user", "content": "Can I get a matcha latte please"}]

    (output,) = llm.chat(asked, params, tools=tools)

    text = output.outputs[0].text
    assert "<tool_call>" in text
    call = json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
    assert call["name"] in {tool["function"]["name"] for tool in tools}
