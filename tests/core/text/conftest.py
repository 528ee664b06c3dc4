"""One tokenizer of every kind, each trained once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizer_kinds import KINDS, write_tokenizer

from quire.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return where the tokenizer of a kind lies; each is trained once."""
    root = tmp_path_factory.mktemp("tokenizers")
    return cache(lambda kind: write_tokenizer(root / kind, kind))


@pytest.fixture(scope="session")
def tokenizer_of(folder_of: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """Return the tokenizer of a kind."""
    return cache(lambda kind: Tokenizer.from_folder(folder_of(kind)))


@pytest.fixture(params=KINDS, scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer(kind: str, tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_of(kind)
