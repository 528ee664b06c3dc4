"""Tokenizers of every kind as grammar engines meet them, and as llguidance reads them itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from quire.interfaces.grammar import GrammarKind, GrammarMatcher, GrammarSource, GrammarVocabulary
from quire.structured.vocabulary import read_vocabulary
from quire.text.tokenizer import Tokenizer

# Those that have every byte.
WHOLE = ("gpt2", "llama3", "qwen2", "llama2", "llama2_legacy", "mistral", "gemma")
TEXTS = ('name": "x', '{"order": 12}', "  a\n b\t", "café 漢字 ☃", "<tool_call>\n{", " ")
SCHEMA = {
    "type": "object",
    "properties": {
        "name of it": {"type": "string", "maxLength": 8},
        "order": {"enum": ["red dog", "<b>the coffee</b>"]},
    },
    "required": ["name of it", "order"],
    "additionalProperties": False,
}
PADDING = 40


def vocabulary_of(folder: Path, end: str | None = None) -> GrammarVocabulary:
    tokenizer = Tokenizer.from_folder(folder)
    eos = tokenizer.eos_token_id if end is None else tokenizer.token_to_id(end)
    assert eos is not None
    return read_vocabulary(folder, vocab_size=tokenizer.vocab_size + PADDING, eos_token_ids=(eos,))


@pytest.fixture(params=WHOLE, scope="module")
def vocabulary(
    request: pytest.FixtureRequest, folder_of: Callable[[str], Path]
) -> GrammarVocabulary:
    return vocabulary_of(folder_of(request.param))


def written(vocabulary: GrammarVocabulary, token_ids: list[int]) -> bytes:
    return b"".join(vocabulary.tokens[i] for i in token_ids)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_an_inner_text_are_its_bytes(vocabulary: GrammarVocabulary, text: str) -> None:
    assert written(vocabulary, vocabulary.encode(text)) == text.encode()


def test_a_text_that_the_tokenizer_changes_is_written_by_the_longest_tokens(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    backend = Backend.from_file(str(folder_of("gpt2") / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "tokenizer.json"))
    found = vocabulary_of(tmp_path, "<|endoftext|>")

    token_ids = found.encode("The coffee")

    assert written(found, token_ids) == b"The coffee"
    assert len(token_ids) < len("The coffee")


def test_a_text_that_no_tokens_write_is_an_error(folder_of: Callable[[str], Path]) -> None:
    found = vocabulary_of(folder_of("words"), "<s>")
    with pytest.raises(ValueError, match="no token begins with the byte 123"):
        found.encode("{")


# llguidance's own


@pytest.fixture(scope="module")
def tokens() -> Any:
    pytest.importorskip("llguidance")
    from quire_grammar.llguidance import tokens

    return tokens


def matcher_of(vocabulary: GrammarVocabulary, kind: GrammarKind, text: str) -> GrammarMatcher:
    from quire_grammar.llguidance.engine import LLGuidanceEngine

    return LLGuidanceEngine(vocabulary).compile(GrammarSource(kind=kind, text=text)).start()


def allowed(matcher: GrammarMatcher, vocabulary: GrammarVocabulary) -> list[int]:
    mask = np.zeros((vocabulary.vocab_size + 31) // 32, np.int32)
    matcher.fill_mask(mask)
    return list(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_its_own_tokenizer_makes_the_masks_of_one_that_asks_python(
    vocabulary: GrammarVocabulary, tokens: Any
) -> None:
    assert tokens.Tokenizers(vocabulary).take("a")[1] is False
    asking = attrs.evolve(vocabulary, tokenizer_json=None)
    assert tokens.Tokenizers(asking).take("a")[1] is True
    draw = random.Random(0)
    # Without a "<", which an added token may begin with.
    schema = json.dumps(SCHEMA).replace("<b>", "").replace("</b>", "")
    pair = [matcher_of(one, GrammarKind.JSON_SCHEMA, schema) for one in (vocabulary, asking)]
    answer: list[int] = []
    while not answer or answer[-1] not in vocabulary.eos_token_ids:
        masks = [allowed(one, vocabulary) for one in pair]
        assert masks[0] == masks[1]
        answer.append(draw.choice(masks[0]))
        for one in pair:
            one.accept(answer[-1])

    assert set(json.loads(written(vocabulary, answer[:-1]))) == {"name of it", "order"}


def test_an_added_token_that_it_takes_for_special_stays_text_and_is_not_cut(
    folder_of: Callable[[str], Path], tokens: Any
) -> None:
    found = vocabulary_of(folder_of("qwen2"))
    (call,) = found.encode("<tool_call>")
    assert call not in found.special_token_ids

    of_the_form = matcher_of(found, GrammarKind.REGEX, "<tool_call>x{3}")
    in_a_text = matcher_of(found, GrammarKind.REGEX, "(?s:.)*")

    assert allowed(of_the_form, found) == [call]
    assert call in allowed(in_a_text, found)
    assert tokens.Tokenizers(found).take(r'{"const": "\u003Ctool_call>"}')[1] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_ids": (70,)},
        {"special_token_ids": frozenset()},
        {"encode": lambda text: list(text.encode())},
        {"tokenizer_json": lambda: "{}"},
        {"tokenizer_json": lambda: '{"added_tokens": []}'},
        {"vocab_size": 300},
    ],
)
def test_a_tokenizer_that_is_not_the_vocabularys_is_not_taken(
    folder_of: Callable[[str], Path], tokens: Any, changes: dict[str, Any]
) -> None:
    found = attrs.evolve(vocabulary_of(folder_of("llama3")), **changes)
    assert tokens.Tokenizers(found).take("a")[1] is True


def test_tokens_in_another_order_are_not_taken(
    folder_of: Callable[[str], Path], tokens: Any
) -> None:
    found = vocabulary_of(folder_of("llama3"))
    swapped = [*found.tokens[:50], found.tokens[51], found.tokens[50], *found.tokens[52:]]
    assert tokens.Tokenizers(attrs.evolve(found, tokens=swapped)).take("a")[1] is True
