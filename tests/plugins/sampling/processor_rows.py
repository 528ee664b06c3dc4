"""A logits processor on one row, and draws from what it leaves."""

from __future__ import annotations

import math
from typing import Any

import torch
from sampling_rows import make_batch
from torch import Tensor

from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.request import SamplingParams
from quire_sampling.reference.sampler import ReferenceSampler

NUM_DRAWS = 100_000
MAX_LEN = 400


def state_of(rows: list[int], tokens: list[list[int]], max_num_seqs: int = 8) -> LogitsState:
    """Return the state of persistent rows with these tokens, of which the prompt has one."""
    history = torch.zeros((max_num_seqs, MAX_LEN), dtype=torch.int32)
    counts = torch.zeros(max_num_seqs, dtype=torch.int32)
    for row, own in zip(rows, tokens, strict=True):
        history[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        counts[row] = len(own)
    return LogitsState(
        rows=torch.tensor(rows, dtype=torch.int32),
        token_history=history,
        num_tokens=counts,
        num_prompt_tokens=torch.ones(max_num_seqs, dtype=torch.int32),
        host_rows=rows,
    )


def apply_alone(
    kind: type[LogitsProcessor], logits: Tensor, tokens: list[int], arguments: Any
) -> Tensor:
    """Return one row's logits after the processor."""
    processor = kind(len(logits), 8, "cpu")
    processor.add_row(3, arguments, SamplingParams(extra_args={kind.name: arguments}))
    return processor.apply(logits[None].clone(), state_of([3], [tokens]))[0]


def draws_follow(logits: Tensor, want: Tensor) -> bool:
    """Return whether 100,000 draws follow the probabilities; a chance of one in ten million."""
    batch = make_batch([{}], vocab_size=len(logits))
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "child_index"):
        setattr(batch, name, getattr(batch, name).expand(NUM_DRAWS))
    batch.position = torch.arange(NUM_DRAWS)
    drawn = ReferenceSampler().sample(logits.expand(NUM_DRAWS, -1), batch).token_ids.flatten()
    counts = torch.bincount(drawn, minlength=len(logits)).double()
    possible = want > 0
    if counts[~possible].sum() > 0:
        return False
    mean = NUM_DRAWS * want[possible]
    freedom = max(int(possible.sum()) - 1, 1)
    ratio = 2 / (9 * freedom)  # Wilson and Hilferty
    limit = freedom * (1 - ratio + 5.2 * math.sqrt(ratio)) ** 3
    return bool(((counts[possible] - mean) ** 2 / mean).sum() < limit)
