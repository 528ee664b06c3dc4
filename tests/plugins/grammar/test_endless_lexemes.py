"""A lexeme that takes all that another one would need holds the library up for no one else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from byte_vocabulary import byte_vocabulary
from numpy.typing import NDArray

pytest.importorskip("llguidance")
from quire.constraints import GrammarKind, GrammarSource, StructuredOutputsParams
from quire_grammar.llguidance.engine import LLGuidanceEngine

PART = {"type": "regex", "pattern": "x+"}
LARK = 'start: "a" x x\nx: /x+/\n%llguidance {"no_forcing": false}'
SOURCES = {
    "lark": GrammarSource(kind=GrammarKind.LARK, text=LARK),
    "gbnf": GrammarSource(kind=GrammarKind.GBNF, text='root ::= "a" "x"+ "x"+'),
    "regexes": StructuredOutputsParams(
        structural_tag=json.dumps(
            {
                "type": "structural_tag",
                "format": {
                    "type": "sequence",
                    "elements": [{"type": "const_string", "value": "a"}, PART, PART],
                },
            }
        )
    ).source,
    "grammars": StructuredOutputsParams(
        structural_tag={
            "type": "structural_tag",
            "format": {"type": "grammar", "grammar": LARK},
        }
    ).source,
}


@pytest.mark.parametrize("name", SOURCES)
def test_masks_are_filled_behind_a_lexeme_that_never_ends(
    name: str, mask: NDArray[np.int32]
) -> None:
    matcher = LLGuidanceEngine(byte_vocabulary()).compile(SOURCES[name]).start()
    for character in b"axxxxxxxx":
        matcher.fill_mask(mask)
        matcher.accept(character)
    matcher.fill_mask(mask)

    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    assert ord("x") in allowed
