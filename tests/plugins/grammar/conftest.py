"""Engines of grammars, each with a vocabulary of bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.interfaces.grammar import GrammarEngine

CORE = Path(__file__).parents[2] / "core"
sys.path += [str(Path(__file__).parent), str(CORE)]  # tiny_llama, schema_cases

from byte_vocabulary import END, byte_vocabulary  # noqa: E402


@pytest.fixture
def mask() -> NDArray[np.int32]:
    return np.zeros((END + 32) // 32, np.int32)


@pytest.fixture(scope="session", params=["llguidance", "xgrammar"])
def engine(request: pytest.FixtureRequest) -> GrammarEngine:
    pytest.importorskip(request.param)
    if request.param == "xgrammar":
        from quire_grammar.xgrammar.engine import XGrammarEngine

        return XGrammarEngine(byte_vocabulary())
    from quire_grammar.llguidance.engine import LLGuidanceEngine

    return LLGuidanceEngine(byte_vocabulary())
