"""A damaged tokenizer is refused in one line that names file and key, and loads lightly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import CORPUS, build_words

from quire.errors import ConfigError, RequestError
from quire.text.tokenizer import Tokenizer


def test_a_folder_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.json: not found; .*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{not json",
        b"[1]",
        b"{}",
        b'{"version": "1.0"}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
        b'{"version": "1.0", "model": {"type": "Unigram", "vocab": [], "unk_id": 3}}',
        b'{"version": "9.9", "model": {"type": "Nothing"}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_a_damaged_tokenizer_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)

    with pytest.raises(ConfigError, match="tokenizer.json") as error:
        Tokenizer.from_folder(tmp_path)

    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_truncated_tokenizer_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    whole = (folder_of("gpt2") / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(ConfigError, match="tokenizer.json: damaged"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"bos_token": 5}, "bos_token"),
        ({"eos_token": {"text": "x"}}, "eos_token"),
        ({"eos_token": {"content": "x", "lstrip": "yes"}}, "eos_token"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"5": 7}}, "added_tokens_decoder.5"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens"),
        ({"extra_special_tokens": [5]}, "extra_special_tokens"),
        ({"clean_up_tokenization_spaces": "x"}, "clean_up_tokenization_spaces"),
        ("{not json", "not JSON"),
        ("[]", "list"),
    ],
)
def test_a_bad_setting_is_an_error_that_names_file_and_key(
    config: Any, key: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder_of("gpt2") / "tokenizer.json").read_bytes())
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "tokenizer_config.json").write_text(text)

    with pytest.raises(ConfigError, match="tokenizer_config.json") as error:
        Tokenizer.from_folder(tmp_path)

    assert key in str(error.value)


def test_a_tokenizer_without_settings_is_used_as_it_is(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder_of("gpt2") / "tokenizer.json").read_bytes())

    tokenizer = Tokenizer.from_folder(tmp_path)

    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert tokenizer.special_tokens == {}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b"])
def test_half_a_surrogate_pair_is_the_prompts_error(text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate") as one:
        tokenizer.encode(text)
    with pytest.raises(RequestError, match="surrogate") as many:
        tokenizer.encode_batch(["a", text])

    assert one.value.parameter == many.value.parameter == "prompt"


def build_panicking(folder: Path, change: dict[str, Any]) -> Path:
    backend, _ = build_words()
    source = {**json.loads(backend.to_str()), **change}
    (folder / "tokenizer.json").write_text(json.dumps(source))
    return folder


def test_a_panic_of_the_library_is_one_requests_error(tmp_path: Path) -> None:
    # The library's Strip decoder panics on an empty token; that is no Exception in Python.
    strip = {"type": "Strip", "content": "x", "start": 0, "stop": 1}
    fuse = {"type": "Replace", "pattern": {"String": "hello"}, "content": ""}
    decoder = {"type": "Sequence", "decoders": [fuse, strip]}
    tokenizer = Tokenizer.from_folder(build_panicking(tmp_path, {"decoder": decoder}))

    with pytest.raises(RequestError, match="the tokenizer fails"):
        tokenizer.decode(tokenizer.encode("hello"))


def test_a_tokenizer_that_panics_on_any_text_is_refused_when_it_is_read(tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": "<gone>", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    build_panicking(tmp_path, {"post_processor": template})

    with pytest.raises(ConfigError, match="tokenizer.json: damaged"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], ["a"]])
def test_what_cannot_be_an_id_is_refused(
    ids: Any, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    with pytest.raises(RequestError, match="token ids"):
        tokenizer_of("gpt2").decode(ids)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(
    tokenizer: Tokenizer,
) -> None:
    size = tokenizer.vocab_size
    tokenizer.check_fits(size)

    with pytest.raises(ConfigError, match=rf"has id {size - 1}, .* is {size - 1};"):
        tokenizer.check_fits(size - 1)


def test_tokens_and_ids_are_each_others_inverse(tokenizer: Tokenizer) -> None:
    ids = range(tokenizer.vocab_size)

    tokens = [tokenizer.id_to_token(token_id) for token_id in ids]

    assert [tokenizer.token_to_id(token) for token in tokens if token is not None] == list(ids)
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None


def test_no_token_is_longer_than_the_bound_says(tokenizer: Tokenizer) -> None:
    texts = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]

    assert tokenizer.longest_token_chars == max(map(len, texts))


LIGHT = """
import sys
import quire.text.chat_template, quire.text.input_processor, quire.text.output_processor
import quire.text.generation_config
heavy = {"torch", "transformers", "tokenizers", "jinja2"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


def test_importing_the_text_modules_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


JOINING = ("gpt2", "qwen2", "llama2", "llama2_legacy", "mistral", "gemma", "unigram", "words")


@pytest.mark.parametrize("kind", JOINING)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_of_tokens_put_together_are_the_bytes_of_the_text(
    kind: str, data: st.DataObject, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    text = data.draw(st.text(max_size=40) | st.sampled_from(CORPUS))
    ids = tokenizer.encode(text)

    together = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)

    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert together.decode("utf-8", "replace").removeprefix(" ") == decoded.removeprefix(" ")


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama2", "gemma"])
def test_half_a_character_keeps_its_exact_bytes(
    kind: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("a\U0001f9ffb", add_special_tokens=False)

    together = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)

    assert together.removeprefix(b" ") == "a\U0001f9ffb".encode()
    assert len(ids) > 3, "the character is several tokens"


def test_special_token_has_the_bytes_of_its_spelling_and_no_token_has_none(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("llama3")

    assert tokenizer.token_bytes(0) == b"<|begin_of_text|>"
    assert tokenizer.token_bytes(10**6) == b""
