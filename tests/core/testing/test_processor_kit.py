"""The kit passes a right logits processor, catches broken ones, and says what is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
from attrs import evolve
from broken_processors import BROKEN, SAYS, NoRepeat, expected
from torch import Tensor

from quire.testing import LogitsProcessorTests, check_processor
from quire.testing.kit_processor import ProcessorSubject, guessed_arguments
from quire.testing.kit_report import PROFILES

# As many cases on a slow machine as on a fast one.
PATIENT = evolve(PROFILES["quick"], seconds=60)


class TestNoRepeat(LogitsProcessorTests):
    processor = NoRepeat
    arguments = (1, 2, 5)
    bad_arguments = (0, -1, "a", True)

    def expected(
        self, logits: Tensor, tokens: list[int], num_prompt_tokens: int, arguments: Any
    ) -> Tensor | None:
        return expected(logits, tokens, num_prompt_tokens, arguments)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_processor_is_caught(name: str) -> None:
    subject = ProcessorSubject(
        processor=BROKEN[name], arguments=(1, 2, 5), bad_arguments=(0,), expected=expected
    )

    report = check_processor(subject, profile=PATIENT)

    [failure] = [check.detail for check in report.checks if check.outcome == "failed"]
    print(failure)
    assert re.search(SAYS[name], failure)


def test_arguments_of_a_strange_processor_are_those_that_it_does_not_refuse() -> None:
    assert guessed_arguments(NoRepeat) == (1,)
