"""A vocabulary of bytes, which grammar engines are tested with."""

from quire.interfaces.grammar import GrammarVocabulary

END = 256


def byte_vocabulary() -> GrammarVocabulary:
    """Return a token a byte, and an end token."""
    return GrammarVocabulary(
        tokens=[*[bytes([i]) for i in range(256)], b"<end>"],
        special_token_ids=frozenset({END}),
        eos_token_ids=(END,),
        vocab_size=END + 1,
        encode=lambda text: list(text.encode()),
    )
