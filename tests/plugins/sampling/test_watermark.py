"""The watermark against a plain computation, the kit, and a detector that reads texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from processor_rows import apply_alone, draws_follow, state_of
from torch import Tensor

from quire import LLM, SamplingParams
from quire.request import RequestOutput
from quire.testing import LogitsProcessorTests
from quire_sampling.watermark.processor import Watermark, green_lists

MASK = 2**32 - 1


@cache
def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Return Philox4x32-10 in Python's whole numbers."""
    c0, c1, c2, c3 = counter
    a, b = seed & MASK, seed >> 32
    for _ in range(10):
        x, y = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (y >> 32) ^ c1 ^ a, y & MASK, (x >> 32) ^ c3 ^ b, x & MASK
        a, b = (a + 0x9E3779B9) & MASK, (b + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def is_green(before: int, token_id: int, gamma: float, key: int) -> bool:
    return philox((token_id // 4, before, 0, 1), key)[token_id % 4] < gamma * 2**32


def z_score(tokens: list[int], gamma: float, key: int) -> float:
    """Return by how many standard deviations a text has more green tokens than by chance."""
    pairs = list(pairwise(tokens))
    count = sum(is_green(before, token_id, gamma, key) for before, token_id in pairs)
    return (count - gamma * len(pairs)) / math.sqrt(len(pairs) * gamma * (1 - gamma))


def expected(logits: Tensor, before: int, arguments: Any) -> Tensor:
    given = {} if arguments is True else arguments
    gamma, key = given.get("gamma", 0.25), given.get("key", 0)
    green = [is_green(before, token_id, gamma, key) for token_id in range(len(logits))]
    return logits + torch.tensor(green) * given.get("delta", 2.0)


class TestWatermark(LogitsProcessorTests):
    processor = Watermark
    arguments = (
        {},
        True,
        {"gamma": 0.5, "delta": 4},
        {"key": 2**53, "gamma": 0.3},
    )
    bad_arguments = (
        None,
        1,
        {"gamma": 0},
        {"gamma": 1.0},
        {"delta": -1},
        {"delta": float("nan")},
        {"key": 2**53 + 1},
        {"key": 1.0},
        {"key": True},
        {"gama": 0.5},
    )

    def expected(self, logits: Any, tokens: Any, num_prompt_tokens: int, arguments: Any) -> Any:
        return expected(logits, tokens[-1], arguments)


def generate(num_tokens: int, arguments: Any, vocab_size: int = 64) -> list[int]:
    """Draw a text from random logits, each token after the processor."""
    processor = Watermark(vocab_size, 8, "cpu")
    processor.add_row(2, arguments, SamplingParams())
    generator = torch.Generator().manual_seed(11)
    tokens = [5]
    for _ in range(num_tokens):
        logits = torch.randn(1, vocab_size, generator=generator)
        probabilities = processor.apply(logits, state_of([2], [tokens])).softmax(-1)
        tokens.append(int(torch.multinomial(probabilities[0], 1, generator=generator)))
    return tokens


@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_detector_finds_the_watermark_with_its_key_and_no_other(gamma: float) -> None:
    text = generate(300, {"gamma": gamma, "delta": 2.0, "key": 77})

    assert z_score(text, gamma, 77) > 8
    assert abs(z_score(text, gamma, 78)) < 4


def test_detector_finds_nothing_in_a_text_without_it() -> None:
    text = generate(300, None)

    assert all(abs(z_score(text, 0.25, key)) < 4 for key in range(5))


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5])
def test_share_of_green_tokens_is_gamma(gamma: float) -> None:
    before = torch.arange(20)
    share = torch.full((20,), gamma, dtype=torch.float64)

    green = green_lists(before, 5000, share, torch.full_like(before, 3))

    assert green.shape == (20, 5000)
    deviation = math.sqrt(gamma * (1 - gamma) / green.numel())
    assert abs(green.double().mean().item() - gamma) < 5 * deviation
    assert not torch.equal(green[0], green[1])


def test_draws_follow_the_raised_logits(logits_of: Callable[[int], Tensor]) -> None:
    logits = logits_of(14)

    left = apply_alone(Watermark, logits, [9, 4], {"delta": 1.5, "gamma": 0.5})

    want = expected(logits.double(), 4, {"delta": 1.5, "gamma": 0.5})
    assert draws_follow(left, want.softmax(0))


def test_answers_of_an_engine_carry_the_watermark_where_it_was_asked_for() -> None:
    llm = LLM("demo", logits_processors=["watermark"], max_num_seqs=4, max_model_len=256)
    asked = {"watermark": {"delta": 4.0, "key": 9}}
    plain = SamplingParams(max_tokens=120, ignore_eos=True, seed=1)
    prompts = ["A small coffee, please", "The best tea is"]
    both = [plain.with_values(extra_args=asked), plain]

    with_mark, without = llm.generate(prompts, both, use_tqdm=False)

    def score(output: RequestOutput) -> float:
        return z_score(output.prompt_token_ids[-1:] + output.outputs[0].token_ids, 0.25, 9)

    assert score(with_mark) > 5
    assert abs(score(without)) < 4
