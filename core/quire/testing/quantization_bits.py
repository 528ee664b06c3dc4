"""Whether the rows of a layer have the same bits however many there are: judges one case."""

from __future__ import annotations

import torch
from attrs import evolve

from quire.testing.bound import bits
from quire.testing.kit_report import Failure
from quire.testing.quantization_cases import (
    LayerCase,
    QuantizationSubject,
    make_input,
    make_layer,
)
from quire.testing.quantization_checks import judge_product

# How often the rows of a case are there in a large batch.
LARGE = 12


def check_batch_invariance(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """Each row has the same bits alone, in a batch and in a large one, and the right ones."""
    loaded = make_layer(subject, subject.make(), evolve(case, batch_invariant=True))
    if loaded is None:
        return None
    x = make_input(case, subject.device)
    together = loaded.layer(x)
    wrong = judge_product(subject, case, loaded, x, together)
    if wrong is not None:
        return wrong
    for row in range(case.rows):
        alone = loaded.layer(x[row : row + 1])
        if not _same(alone, together[row : row + 1]):
            what = f"row {row} differs in its bits from the row alone"
            return Failure(what=what, case=case, guess="the order of a sum depends on the batch")
    large = loaded.layer(x.repeat(LARGE, 1))
    if not _same(large, together.repeat(LARGE, 1)):
        what = f"a row differs in its bits from the same row among {LARGE} times as many"
        return Failure(what=what, case=case, guess="the order of a sum depends on the batch")
    return None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Answer whether two outputs have the same bits; a row of zeros gives zeros of either sign."""
    return torch.equal(bits(a + 0.0), bits(b + 0.0))
