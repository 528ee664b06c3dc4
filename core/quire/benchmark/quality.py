"""How well a model predicts a text, and how near it is to itself in its own dtype.

The numbers are made of the logits of the engine itself: a passage is a request that asks for the
log-probabilities of its prompt, and the model's logits are looked at as they are made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor

from quire.benchmark.machine import describe
from quire.benchmark.passages import cut
from quire.errors import ConfigError, QuireError
from quire.llm import LLM
from quire.request import SamplingParams

if TYPE_CHECKING:
    from quire.frontend import Frontend
    from quire.interfaces.model import Model

# Rows that are made log-probabilities at once: 152k tokens in float32 are then 40 MB.
SLICE_ROWS = 64


@define(kw_only=True)
class Tally:
    """Sums over tokens that were guessed; a passage's first is not.

    `num_hits`: the guess that is most likely was true; `num_agreed`: it is the baseline's;
    `divergence`: KL(baseline || model) in nats.
    """

    num_tokens: int = 0
    loss: float = 0.0
    num_hits: int = 0
    num_agreed: int = 0
    divergence: float = 0.0

    def add(self, logits: Tensor, token_ids: Tensor, baseline: Tensor | None) -> None:
        """Count logits [rows, vocab_size], the tokens that came, and the baseline's logits."""
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.argmax(-1)
        self.num_tokens += len(token_ids)
        self.loss -= float(logprobs.gather(1, token_ids[:, None]).sum(dtype=torch.float64))
        self.num_hits += int((best == token_ids).sum())
        if baseline is None:
            return
        true = baseline.float().log_softmax(-1)
        self.num_agreed += int((best == true.argmax(-1)).sum())
        # A token that the baseline excludes adds nothing, whatever the model gives it.
        each = torch.where(true > -torch.inf, true.exp() * (true - logprobs), 0.0)
        self.divergence += float(each.sum(dtype=torch.float64))

    def figures(self, *, has_baseline: bool) -> dict[str, float | int | None]:
        """Return the means."""
        count = self.num_tokens
        return {
            "tokens": count,
            "loss": self.loss / count,
            "perplexity": math.exp(self.loss / count) if self.loss / count < 700 else math.inf,
            "accuracy": self.num_hits / count,
            "agreement": self.num_agreed / count if has_baseline else None,
            "kl_divergence": self.divergence / count if has_baseline else None,
        }


@contextlib.contextmanager
def watched(model: Model) -> Iterator[list[Tensor]]:
    """Collect the logits that a model makes meanwhile."""
    seen: list[Tensor] = []
    make = model.logits

    def logits(hidden: Tensor) -> Tensor:
        made = make(hidden)
        seen.append(made)
        return made

    model.logits = logits  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del model.logits


def logits_of(llm: LLM, token_ids: Sequence[int]) -> Tensor:
    """Return the logits [tokens - 1, vocab_size] after each token of a passage but the last.

    Raises: QuireError where the engine fails.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    with watched(llm.engine.runner.model) as seen:
        outputs = llm.generate({"prompt_token_ids": list(token_ids)}, params, use_tqdm=False)
    if outputs[0].outputs[0].finish_reason == "error":
        raise QuireError("a passage failed: the model's logits are not finite.")
    # The last row is of the token that was sampled, which nobody asked for.
    logits = torch.cat([rows.detach().clone() for rows in seen])[:-1]
    if logits.shape[0] != len(token_ids) - 1:
        raise QuireError(f"{logits.shape[0]} rows of logits for {len(token_ids)} tokens.")
    return logits


def measure(
    frontend: Frontend, passages: list[list[int]], baseline: Frontend | None, *, window: int
) -> dict[str, Any]:
    """Load the models, guess every token and return the report. Raises: QuireError."""
    llm = LLM.from_frontend(frontend)
    other = None if baseline is None else LLM.from_frontend(baseline)
    llms = [llm] if other is None else [other, llm]
    if other is not None and other.engine.runner.vocab_size != llm.engine.runner.vocab_size:
        raise ConfigError(
            f"the baseline has {other.engine.runner.vocab_size} tokens and the model "
            f"{llm.engine.runner.vocab_size}; a baseline needs the same vocabulary."
        )
    longest = min(window, *(one.engine.max_model_len - 1 for one in llms))
    pieces = cut(passages, longest)
    tallies = _guess(llm, other, pieces)
    settings = llm.engine.config.to_options()
    return {
        "benchmark": "quality",
        "model": frontend.prepared.describe(),
        "machine": describe(llm.engine.runner.device),
        "choices": {choice.kind: choice.used for choice in llm.engine.selections},
        "settings": {name: value for name, value in settings.items() if name != "model"},
        "workload": {"passages": len(pieces), "window": longest},
        "rows": [
            {
                "model": one.frontend.config.model.model,
                "quantization": one.frontend.prepared.quantization.name,
                "kv_cache": one.frontend.prepared.config.kv_dtype,
                **tally.figures(has_baseline=one is llm and other is not None),
            }
            for one, tally in zip(llms, tallies, strict=True)
        ],
    }


def _guess(llm: LLM, other: LLM | None, pieces: list[list[int]]) -> list[Tally]:
    """Return the tallies of the baseline, where there is one, and of the model."""
    own, plain = Tally(), Tally()
    for piece in pieces:
        logits = logits_of(llm, piece)
        true = None if other is None else logits_of(other, piece)
        targets = torch.tensor(piece[1:], device=logits.device)
        for begin in range(0, len(targets), SLICE_ROWS):
            rows = slice(begin, begin + SLICE_ROWS)
            own.add(logits[rows], targets[rows], None if true is None else true[rows])
            if true is not None:
                plain.add(true[rows], targets[rows], None)
    return [own] if other is None else [plain, own]
