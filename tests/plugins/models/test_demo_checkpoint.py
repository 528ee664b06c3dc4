"""The demo's two checkpoints as files: sizes, tokenizer, chat template and model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

import quire_models.demo

DEMO = Path(quire_models.demo.__file__).parent
DIALOGUES = Path(__file__).parents[2] / "data" / "coffee_orders_valid.jsonl"
FOLDERS = ("model", "draft")
TOOLS = json.loads((DEMO / "tools.json").read_text())
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

CALL = {"name": "get_menu_items", "arguments": '{"query": "Latte"}'}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": CALL}]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": '{"menu_items":[]}'}
ASKING = {"role": "user", "content": "A latte, please."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))


def read(folder: str, name: str) -> Any:
    return json.loads((DEMO / folder / name).read_text())


def render(messages: list[dict[str, Any]], **arguments: Any) -> str:
    """Render as Transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(read("model", "tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, **arguments)


def tensor_sizes(folder: str) -> dict[str, int]:
    """Return the number of elements of each tensor, from the file's header."""
    with safe_open(DEMO / folder / "model.safetensors", "numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        assert {piece.get_dtype() for piece in slices.values()} == {"BF16"}
        shapes = {name: piece.get_shape() for name, piece in slices.items()}
    return {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}


@pytest.mark.parametrize(("folder", "megabytes"), [("model", 14), ("draft", 3)])
def test_weights_file_is_small_enough_to_ship(folder: str, megabytes: int) -> None:
    assert (DEMO / folder / "model.safetensors").stat().st_size <= megabytes * 1_000_000


@pytest.mark.parametrize(("folder", "at_most"), [("model", 7_000_000), ("draft", 1_200_000)])
def test_number_of_parameters_is_what_the_card_says(folder: str, at_most: int) -> None:
    count = sum(tensor_sizes(folder).values())

    assert count <= at_most
    assert f"{count:,}" in (DEMO / folder / "README.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS)
def test_embeddings_are_tied_and_as_large_as_the_vocabulary(
    folder: str, tokenizer: Tokenizer
) -> None:
    config, sizes = read(folder, "config.json"), tensor_sizes(folder)

    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in sizes
    assert config["vocab_size"] == tokenizer.get_vocab_size() == 4096
    assert sizes["model.embed_tokens.weight"] == config["vocab_size"] * config["hidden_size"]


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_draft_carries_the_tokenizer_of_the_model(name: str) -> None:
    assert (DEMO / "draft" / name).read_bytes() == (DEMO / "model" / name).read_bytes()


@pytest.mark.parametrize("folder", FOLDERS)
def test_end_tokens_are_those_of_the_tokenizer(folder: str, tokenizer: Tokenizer) -> None:
    end_of_turn, end_of_text = map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>"))

    assert read(folder, "generation_config.json")["eos_token_id"] == [end_of_turn, end_of_text]
    assert read(folder, "config.json")["eos_token_id"] == end_of_turn
    assert read(folder, "tokenizer_config.json")["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        bytes(range(256)).decode("latin-1"),
        "".join(map(chr, range(0x2000, 0x2100))),
        "  two spaces,\ttabs\r\n\n\nand   ends  ",
        "naïve café, 日本語, עברית, 👩🏽‍🚀 and e\u0301",
        '{"menu_item_id": "cappuccino-7561", "quantity": "1"}',
    ],
)
def test_tokenizer_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_knows_every_byte(tokenizer: Tokenizer) -> None:
    alphabet = {token for token in tokenizer.get_vocab() if len(token) == 1}

    assert len(alphabet) >= 256


def test_tokenizer_splits_numbers_into_digits(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("latte-0256").tokens[-4:] == ["0", "2", "5", "6"]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_token_is_one_token_and_vanishes_in_decoding(
    tokenizer: Tokenizer, token: str
) -> None:
    [token_id] = tokenizer.encode(token).ids

    assert tokenizer.decode([token_id]) == ""


@pytest.mark.parametrize("token", TOOL_TOKENS)
def test_tool_token_is_one_token_and_stays_in_decoding(tokenizer: Tokenizer, token: str) -> None:
    [token_id] = tokenizer.encode(token).ids

    assert tokenizer.decode([token_id]) == token


def test_template_renders_a_plain_chat() -> None:
    messages = [ASKING, {"role": "assistant", "content": "Sure."}]

    assert render(messages) == (
        "<|im_start|>user\nA latte, please.<|im_end|>\n<|im_start|>assistant\nSure.<|im_end|>\n"
    )


def test_template_asks_for_the_assistant() -> None:
    assert render([ASKING], add_generation_prompt=True) == (
        "<|im_start|>user\nA latte, please.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_puts_the_tools_below_the_system_message() -> None:
    text = render([{"role": "system", "content": "Be kind."}, ASKING], tools=TOOLS[:1])

    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(TOOLS[0]['function'])}\n</tools>" in text
    assert text.count("<|im_start|>system") == 1


def test_template_renders_a_call_whose_content_is_null() -> None:
    assert render([CALLING]) == (
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_menu_items", "arguments": {"query": "Latte"}}\n'
        "</tool_call><|im_end|>\n"
    )


def test_template_renders_arguments_given_as_an_object_like_those_given_as_text() -> None:
    function = CALL | {"arguments": {"query": "Latte"}}

    assert render([CALLING | {"tool_calls": [{"function": function}]}]) == render([CALLING])


def test_template_puts_calls_below_the_content_one_a_line() -> None:
    text = render([CALLING | {"content": "Let me see.", "tool_calls": CALLING["tool_calls"] * 2}])

    assert text.startswith("<|im_start|>assistant\nLet me see.\n<tool_call>\n")
    assert "\n</tool_call>\n<tool_call>\n" in text


def test_template_gathers_results_in_one_block() -> None:
    block = '<tool_response>\n{"menu_items":[]}\n</tool_response>'

    assert render([RESULT, RESULT]) == f"<|im_start|>tool\n{block}\n{block}<|im_end|>\n"


def test_template_joins_the_texts_of_content_in_parts() -> None:
    parts = [{"type": "text", "text": "A latte, "}, {"type": "text", "text": "please."}]

    assert render([{"role": "user", "content": parts}]) == render([ASKING])


def test_template_only_adds_to_what_it_rendered_before() -> None:
    """Or the prefix cache would miss on every turn."""
    messages = [ASKING, CALLING, RESULT]

    before = render(messages[:1], tools=TOOLS, add_generation_prompt=True)

    assert render(messages, tools=TOOLS).startswith(before)


def test_longest_dialogue_fits_the_context(tokenizer: Tokenizer) -> None:
    dialogues = [json.loads(line)["messages"] for line in DIALOGUES.read_text().splitlines()]
    longest = max((render(messages, tools=TOOLS) for messages in dialogues), key=len)

    length = len(tokenizer.encode(longest).ids)

    assert length <= read("model", "config.json")["max_position_embeddings"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    "phrase",
    [
        "Taskmaster-4",
        "Bill Byrne",
        "Saravanan Ganesh",
        "Google LLC",
        "https://creativecommons.org/licenses/by/4.0/",
        "arXiv 2403.10704",
        "Changed",
    ],
)
def test_card_attributes_the_data(folder: str, phrase: str) -> None:
    assert phrase in (DEMO / folder / "README.md").read_text()
