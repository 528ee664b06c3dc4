"""A tokenizer's tokens as grammar engines want them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quire.interfaces.grammar import GrammarVocabulary
from quire.text.tokenizer import Tokenizer

# Before a text, so that the space that some tokenizers begin with stands before this.
LEAD = "\n"
MOST_LEADING = 4  # tokens


def read_vocabulary(
    folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...], is_for_checks: bool = False
) -> GrammarVocabulary:
    """Read the tokenizer of a folder, for an engine or only to check grammars.

    Raises: ConfigError.
    """
    tokenizer = Tokenizer.from_folder(folder)
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return GrammarVocabulary(
        tokens=tokens,
        special_token_ids=tokenizer.special_token_ids,
        eos_token_ids=eos_token_ids,
        vocab_size=vocab_size,
        encode=InnerEncoder(tokenizer, tokens),
        tokenizer_json=None if is_for_checks else tokenizer.to_json,
    )


class InnerEncoder:
    """Encode a text that others stand before: its tokens' bytes are the text's, and no more.

    Tokenizers of SentencePiece begin a text with a space that it does not have, and normalizers
    may change it.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes]) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._ids: dict[bytes, int] = {}  # by bytes, made where they are needed
        self._longest = max(map(len, tokens), default=0)

    def __call__(self, text: str) -> list[int]:
        """Return the token ids. Raises: ValueError for a byte that no token begins with."""
        wanted = text.encode()
        found = self._tokenizer.encode(text, add_special_tokens=False)
        if self._bytes(found) == wanted:
            return found
        found = self._tokenizer.encode(LEAD + text, add_special_tokens=False)
        for count in range(1, MOST_LEADING):
            if self._bytes(found[count:]) == wanted:
                return found[count:]
        return self._longest_first(wanted)

    def _bytes(self, token_ids: Sequence[int]) -> bytes:
        return b"".join([self._tokens[i] for i in token_ids])

    def _longest_first(self, text: bytes) -> list[int]:
        if not self._ids:
            special = self._tokenizer.special_token_ids
            self._ids = {token: i for i, token in enumerate(self._tokens) if i not in special}
        found, begin = [], 0
        while begin < len(text):
            ends = range(min(begin + self._longest, len(text)), begin, -1)
            end = next((end for end in ends if text[begin:end] in self._ids), None)
            if end is None:
                raise ValueError(f"no token begins with the byte {text[begin]}")
            found.append(self._ids[text[begin:end]])
            begin = end
        return found
