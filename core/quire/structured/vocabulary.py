"""A tokenizer's tokens as grammar engines want them."""

from __future__ import annotations

from pathlib import Path

from quire.interfaces.grammar import GrammarVocabulary
from quire.text.tokenizer import Tokenizer


def read_vocabulary(
    folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> GrammarVocabulary:
    """Read the tokenizer of a folder. Raises: ConfigError."""
    tokenizer = Tokenizer.from_folder(folder)
    return GrammarVocabulary(
        tokens=[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
        special_token_ids=tokenizer.special_token_ids,
        eos_token_ids=eos_token_ids,
        vocab_size=vocab_size,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )
