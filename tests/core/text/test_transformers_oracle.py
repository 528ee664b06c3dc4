"""Token ids, texts and rendered chats equal Transformers'. The only module that imports it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from quire.errors import RequestError
from quire.text.chat_template import ChatTemplate
from quire.text.tokenizer import Tokenizer

TEXTS = (
    "",
    " ",
    "hello world",
    " leading and trailing ",
    "  two  spaces\n\n\tand a tab",
    "The fox doesn't care , does it ?",
    "你好，世界! 🙂👍🏽 naïve café",
    "a<s>b</s> c <|im_start|>user\n<tool_call>{}</tool_call><|eot_id|>",
    "<unk><0x41> ▁under",
    "a\u0000b",
    "e\u0301 ﬁ ½",
)
some_text = st.text(st.sampled_from("abc .,'?!\n\thelo worldGröße你好🙂▁<s>/|0x1"), max_size=40)
RELAXED = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def oracle_of(folder_of: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda kind: AutoTokenizer.from_pretrained(folder_of(kind)))


@pytest.fixture(scope="session")
def oracle(kind: str, oracle_of: Callable[[str], Any]) -> Any:
    return oracle_of(kind)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_gives_the_ids_of_transformers(text: str, tokenizer: Tokenizer, oracle: Any) -> None:
    assert tokenizer.encode(text) == oracle(text).input_ids
    plain = oracle(text, add_special_tokens=False).input_ids
    assert tokenizer.encode(text, add_special_tokens=False) == plain


@RELAXED
@given(text=some_text)
def test_encode_gives_the_ids_of_transformers_for_any_text(
    text: str, tokenizer: Tokenizer, oracle: Any
) -> None:
    assert tokenizer.encode(text) == oracle(text).input_ids


@RELAXED
@given(ids=st.lists(st.integers(0, 600), max_size=30), skips=st.booleans())
def test_decode_gives_the_text_of_transformers_for_any_ids(
    ids: list[int], skips: bool, tokenizer: Tokenizer, oracle: Any
) -> None:
    assert tokenizer.decode(ids, skips) == oracle.decode(ids, skip_special_tokens=skips)


def test_special_tokens_are_those_of_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    assert tokenizer.special_tokens == oracle.special_tokens_map
    assert tokenizer.bos_token_id == oracle.bos_token_id
    assert tokenizer.eos_token_id == oracle.eos_token_id
    assert tokenizer.pad_token_id == oracle.pad_token_id
    assert tokenizer.vocab_size == max(oracle.get_vocab().values()) + 1


TEMPLATES = Path(__file__).with_name("templates")
USER = {"role": "user", "content": "  What is <b>1 & 2</b>? 'é' 🙂\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add", "arguments": {"b": 2, "a": "ü <x>", "list": [1, None, True]}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, {"role": "assistant", "content": "3."}, {"role": "user", "content": "Sure?"}],
    "call": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sum": 3}', "tool_call_id": "call_1", "name": "add"},
    ],
    "reasoning": [USER, {"role": "assistant", "content": "3", "reasoning": "1 and 2"}],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add <two> numbers & more.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


@pytest.fixture(scope="module")
def template_of() -> Iterator[Callable[[str], ChatTemplate]]:
    made = cache(
        lambda name: ChatTemplate.from_file(TEMPLATES / f"{name}.jinja", special_tokens=SPECIAL)
    )
    yield made
    for name in ("chatml_tools", "llama3", "mistral", "parts"):
        made(name).close()


def outcome(render: Callable[[], str]) -> str:
    """Return what was rendered, or that the template refused."""
    try:
        return render()
    except (RequestError, TemplateError):
        return "refused"


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no_prompt"])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no_tools", "tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["chatml_tools", "llama3", "mistral", "parts"])
def test_a_rendered_chat_is_that_of_transformers(
    name: str,
    chat: str,
    tools: list[Any] | None,
    prompt: bool,
    template_of: Callable[[str], ChatTemplate],
    oracle_of: Callable[[str], Any],
) -> None:
    theirs = outcome(
        lambda: oracle_of("llama3").apply_chat_template(
            CHATS[chat],
            tools=tools,
            chat_template=(TEMPLATES / f"{name}.jinja").read_text(),
            add_generation_prompt=prompt,
            tokenize=False,
            enable_thinking=False,
        )
    )

    ours = outcome(
        lambda: template_of(name).render(
            CHATS[chat],
            tools=tools,
            add_generation_prompt=prompt,
            kwargs={"enable_thinking": False},
        )
    )

    assert ours == theirs


@pytest.mark.parametrize("content", ["  Well, it", "ends with space  "])
@pytest.mark.parametrize("name", ["chatml_tools", "llama3", "parts"])
def test_a_final_message_is_continued_as_in_transformers(
    name: str,
    content: str,
    template_of: Callable[[str], ChatTemplate],
    oracle_of: Callable[[str], Any],
) -> None:
    messages = [USER, {"role": "assistant", "content": content}]

    ours = template_of(name).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )

    assert ours == oracle_of("llama3").apply_chat_template(
        messages,
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(),
        continue_final_message=True,
        tokenize=False,
    )


def change_config(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """Copy a checkpoint folder with other settings; None takes one away."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


ADDED = {"content": "fox", "special": False, "normalized": False, "lstrip": True}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"bos_token": "<new>", "extra_special_tokens": ["<more>", "hello"]}),
    ("gpt2", {"add_bos_token": True, "add_eos_token": True}),
    ("gpt2", {"split_special_tokens": True}),
    ("gpt2", {"image_token": "<image>", "extra_special_tokens": {"audio_token": "<audio>"}}),
    (
        "gpt2",
        {
            "additional_special_tokens": [
                "<more>",
                {"__type": "AddedToken", "content": "<most>", "lstrip": True},
            ]
        },
    ),
    ("llama3", {"added_tokens_decoder": {"420": ADDED}}),
    ("llama3", {"added_tokens_decoder": {"1": {"content": "<|end_of_text|>", "special": False}}}),
    ("mistral", {"add_bos_token": False}),
    ("gemma", {"tokenizer_class": None}),
    ("llama2", {"add_prefix_space": False}),
    ("llama2", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("llama3", {"tokenizer_class": "LlamaTokenizer"}),
    ("qwen2", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("qwen2", {"tokenizer_class": None, "unk_token": "<unk!>"}),
    ("unigram", {"clean_up_tokenization_spaces": True}),
]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_settings_change_ids_and_texts_as_in_transformers(
    kind: str, changes: dict[str, Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = change_config(folder_of(kind), tmp_path / kind, changes)

    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)

    text = " hello fox<more> <new>the  fox<|end_of_text|><image><most> <s>x</s>, isn't it ? "
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids
    assert ours.encode_batch([text, "a"]) == [ids, theirs("a").input_ids]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, False) == theirs.decode(ids)
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "Qwen2TokenizerFast", None])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_the_model_type_decides_as_in_transformers(
    kind: str,
    model_type: str,
    tokenizer_class: str | None,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    changes = {"tokenizer_class": tokenizer_class}
    folder = change_config(folder_of(kind), tmp_path / kind, changes)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))

    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)

    text = "Numbers 1234567, we'LL see e\u0301 <|endoftext|>\n\n  x"
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.special_tokens == theirs.special_tokens_map


def test_special_tokens_map_is_read_as_in_transformers(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    changes = {"bos_token": None, "eos_token": None}
    folder = change_config(folder_of("gpt2"), tmp_path / "gpt2", changes)
    tokens = {
        "bos_token": {"content": "<s>", "lstrip": True, "normalized": False, "rstrip": False},
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": ["the"],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))

    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)

    text = "hello  <s> the fox<|endoftext|>"
    assert ours.encode(text) == theirs(text).input_ids
    ids = theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_a_tokenizer_saved_by_transformers_is_read_back(
    folder_of: Callable[[str], Path], tmp_path: Path, oracle_of: Callable[[str], Any]
) -> None:
    theirs = oracle_of("llama2")
    theirs.save_pretrained(tmp_path)
    shutil.copy(folder_of("llama2") / "config.json", tmp_path)

    ours = Tokenizer.from_folder(tmp_path)

    assert ours.encode(" hello<s> world") == theirs(" hello<s> world").input_ids
    assert ours.special_tokens == theirs.special_tokens_map
