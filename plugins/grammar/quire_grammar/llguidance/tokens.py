"""A vocabulary as llguidance's tokenizer: read by the library itself, or asked for in Python.

The library asks for the tokens of a text that has to come. Its threads do not wait for one another
where it has a tokenizer of its own, made of a `tokenizer.json`; that one is taken where it has the
vocabulary's bytes, special tokens, end tokens and ways to cut a text.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Mapping
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper

from quire.interfaces.grammar import GrammarVocabulary

# How the library marks a token that is no text.
SPECIAL = b"\xff"
MAX_KEPT_TEXTS = 65536
# Slices of the vocabulary for a check: texts of JSON, without which a mask of 128,000 tokens can
# take 1 ms. The library's four take a fifth of a schema's time to compile, more than they save.
CHECK_SLICES = [r'[^"\\\x00-\x1F\x7F]+']
FEW_TOKENS = 2**14
ADDED = '"added_tokens":'
# Texts of a form that a tokenizer may cut otherwise: by spaces, letters, digits, marks, lines.
PROBES = ('{"name": "', '", "items": [12, -3.5e7', "true}", "A1b-c_D é 漢字 ☃", "\n\n  x:  y\t")
# Of a grammar's source: what may stand for "<", with which such tokens begin.
MAY_SPELL_ADDED = re.compile(r"<|3c|074", re.IGNORECASE)


class _Tokens:
    """What the library asks of a tokenizer."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        special = _special(vocabulary)
        # Ids that the tokenizer does not know: an end token may be one of them, and a model's
        # vocabulary may be padded. `n_vocab` alone leaves masks at the tokenizer's size.
        size = max(vocabulary.vocab_size, max(special, default=-1) + 1)
        tokens = [*vocabulary.tokens, *[b""] * (size - len(vocabulary.tokens))]
        self.tokens = [SPECIAL + token if i in special else token for i, token in enumerate(tokens)]
        self.special_token_ids = sorted(special)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None
        # Where a form leaves one text, each mask asks for its tokens: in Python, one thread at a
        # time, which took longer than the masks themselves.
        self._encode = functools.lru_cache(MAX_KEPT_TEXTS)(vocabulary.encode)

    def __call__(self, text: bytes) -> list[int]:
        try:
            return self._encode(text.decode())
        except ValueError:  # no token can write it, which the library finds out
            return []


class Tokenizers:
    """The library's tokenizer for a grammar: its own, or one that asks Python; safe for threads."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._own, self._has_dropped = _own_tokenizer(vocabulary)
        # The other is made for the first grammar that needs it, where there may be none.
        self._asking = _asking_tokenizer(vocabulary) if self._own is None else None
        self._for_check: dict[bool, LLTokenizer] = {}  # by whether it asks Python
        if vocabulary.tokenizer_json is None:  # grammars may be checked, of which none waits
            self.take("", is_for_check=True)

    def take(self, text: str, *, is_for_check: bool = False) -> tuple[LLTokenizer, bool]:
        """Return the tokenizer for a grammar of this text, and whether it asks Python.

        One for a check has fewer slices of the vocabulary, which each grammar compiles with itself.
        """
        asks_python = self._own is None or (
            self._has_dropped and MAY_SPELL_ADDED.search(text) is not None
        )
        with self._lock:
            if asks_python and self._asking is None:
                self._asking = _asking_tokenizer(self._vocabulary)
            found = self._asking if asks_python else self._own
            assert found is not None, "one of the two was made"
            if is_for_check:
                if asks_python not in self._for_check:
                    is_small = self._vocabulary.vocab_size <= FEW_TOKENS
                    slices = [] if is_small else CHECK_SLICES
                    self._for_check[asks_python] = found.with_slices(slices)
                found = self._for_check[asks_python]
            return found, asks_python


def _asking_tokenizer(vocabulary: GrammarVocabulary) -> LLTokenizer:
    return LLTokenizer(
        TokenizerWrapper(_Tokens(vocabulary)),
        n_vocab=vocabulary.vocab_size,
        eos_token=list(vocabulary.eos_token_ids),
    )


def _special(vocabulary: GrammarVocabulary) -> set[int]:
    return {*vocabulary.special_token_ids, *vocabulary.eos_token_ids}


def _own_tokenizer(vocabulary: GrammarVocabulary) -> tuple[LLTokenizer | None, bool]:
    """Return the library's own tokenizer, None where it has none or another vocabulary.

    Tells too whether added tokens are only bytes to it: it does not cut texts that spell them.
    """
    if vocabulary.tokenizer_json is None:
        return None, False
    with contextlib.suppress(ValueError):
        text, has_dropped = _with_text_tokens(vocabulary.tokenizer_json())
        found = _read(text, vocabulary)
        if found is not None and _is_same(found, vocabulary):
            return found, has_dropped
    return None, False


def _read(text: str, vocabulary: GrammarVocabulary) -> LLTokenizer | None:
    try:
        return LLTokenizer(
            text, n_vocab=vocabulary.vocab_size, eos_token=list(vocabulary.eos_token_ids)
        )
    # The library panics, which is no Exception, on tokenizers that it does not know.
    except BaseException as error:
        if isinstance(error, (ValueError, TypeError)) or type(error).__name__ == "PanicException":
            return None
        raise


def _with_text_tokens(text: str) -> tuple[str, bool]:
    """Return the tokenizer with added tokens as ordinary ones, where the library mistakes them.

    It takes all of the form `<...>` for special ones. Tells too whether there were any.
    Raises: ValueError for a tokenizer that is not written so.
    """
    begin = text.index(ADDED) + len(ADDED)
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    added, _ = json.JSONDecoder().raw_decode(text, begin)
    dropped = [one for one in added if _is_mistaken(one)]
    if not dropped:
        return text, False
    tokenizer = json.loads(text)
    vocab = tokenizer["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError("a vocabulary with scores")
    # All, since ids of added tokens that the vocabulary lacks are counted from its size.
    vocab.update({one["content"]: one["id"] for one in added})
    tokenizer["added_tokens"] = [one for one in added if not _is_mistaken(one)]
    return json.dumps(tokenizer), True


def _is_mistaken(added: Mapping[str, Any]) -> bool:
    content: str = added["content"]
    return not added["special"] and content.startswith("<") and content.endswith(">")


def _is_same(tokenizer: LLTokenizer, vocabulary: GrammarVocabulary) -> bool:
    """Whether the library read the vocabulary's own tokens, and cuts texts as it does."""
    special = _special(vocabulary)
    if tokenizer.eos_tokens != list(vocabulary.eos_token_ids):
        return False
    if tokenizer.vocab_size != vocabulary.vocab_size or len(special) > tokenizer.vocab_size:
        return False
    for i, token in enumerate(vocabulary.tokens):
        if (i in special) != tokenizer.is_special_token(i) and not token.startswith(SPECIAL):
            return False
        is_text = i not in special and not token.startswith(SPECIAL)
        if is_text and tokenizer.decode_bytes([i]) != token:
            return False
    return all(tokenizer.tokenize_str(text) == vocabulary.encode(text) for text in PROBES)
