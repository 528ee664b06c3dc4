"""A batch for a sampler as a value: how each row is drawn, and what its logits look like."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import field, frozen
from torch import Tensor

from quire.interfaces.sampling import SamplingBatch

INF, NAN = float("inf"), float("nan")
# What lies beside the logits in memory.
BESIDE = 77.0
# What makes a row unusable, by name: values that are put into it.
BAD = {
    "": (),
    "one NaN": (NAN,),
    "one +inf": (INF,),
    "NaN beside +inf": (NAN, INF),
    "all -inf": (),
}


@frozen(kw_only=True)
class Row:
    """How one row is drawn; `top_k` None is off. `bad` is a key of `BAD`.

    `suppressed`: that many of its most likely tokens must not be drawn.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    child: int = 0
    position: int = 0
    bad: str = ""
    suppressed: int = 0

    def __str__(self) -> str:
        if self.temperature == 0:
            words = ["greedy"]
        else:
            words = [f"temperature {self.temperature:g}"]
            words += [f"top_k {self.top_k}"] if self.top_k is not None else []
            words += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
            words += [f"min_p {self.min_p:g}"] if self.min_p else []
            words.append(f"seed {self.seed}, child {self.child}, position {self.position}")
        words += [f"{self.suppressed} suppressed"] if self.suppressed else []
        words += [self.bad] if self.bad else []
        return " ".join(words)


@frozen(kw_only=True)
class SamplerCase:
    """Rows over one vocabulary. `shape` of the logits: normal, ties, flat, peaked or sparse.

    `layout`: contiguous, rows apart (cut from a wider tensor) or columns apart. `more_flags`: the
    host says of rows that they may ask for every filter, as it does where a step is replayed.
    """

    rows: tuple[Row, ...]
    vocab_size: int = 12
    shape: str = "normal"
    dtype: str = "float32"
    layout: str = "contiguous"
    more_flags: bool = field(default=False)
    seed: int = 0

    def __str__(self) -> str:
        rows = " | ".join(map(str, self.rows)) or "none"
        flags = "; flags say more than rows ask" if self.more_flags else ""
        return (
            f"{len(self.rows)} rows of {self.vocab_size} {self.shape} logits, {self.dtype}, "
            f"{self.layout}; seed {self.seed}{flags}; rows: {rows}"
        )


def make_logits(case: SamplerCase) -> Tensor:
    """Return the logits [rows, vocab_size] on the CPU, in the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    logits = 2 * torch.randn(len(case.rows), case.vocab_size, generator=generator)
    if case.shape == "ties":
        logits = logits.round()
    elif case.shape == "flat":
        logits = torch.zeros_like(logits)
    elif case.shape == "peaked":
        logits[:, case.seed % case.vocab_size] += 20
    elif case.shape == "sparse":
        hidden = torch.rand(logits.shape, generator=generator) < 0.5
        hidden[:, case.seed % case.vocab_size] = False
        logits = logits.masked_fill(hidden, -INF)
    logits = logits.to(getattr(torch, case.dtype))
    for i, row in enumerate(case.rows):
        if row.bad == "all -inf":
            logits[i] = -INF
        for at, value in enumerate(BAD[row.bad]):
            logits[i, (case.seed + at) % case.vocab_size] = value
    return logits


def laid_out(case: SamplerCase, logits: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Return the logits as the case lays them, and the whole memory that they lie in."""
    rows, size = logits.shape
    if case.layout == "rows apart":
        whole = logits.new_full((rows, size + 3), BESIDE).to(device)
        view = whole[:, :size]
    elif case.layout == "columns apart":
        whole = logits.new_full((rows, 2 * size), BESIDE).to(device)
        view = whole[:, ::2]
    else:
        whole = view = torch.empty_like(logits, device=device)
    view.copy_(logits)
    return view, whole


def suppressed_of(case: SamplerCase, logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return row and token id of each suppressed token; one token of a row always stays."""
    rows: list[int] = []
    tokens: list[int] = []
    for i, row in enumerate(case.rows):
        count = min(row.suppressed, case.vocab_size - 1)
        usable = logits[i].isfinite()
        count = min(count, int(usable.sum()) - 1)
        if count > 0:
            best = logits[i].float().nan_to_num(nan=-INF, posinf=-INF).topk(count).indices
            rows += [i] * count
            tokens += best.tolist()
    return (torch.tensor(rows), torch.tensor(tokens)) if rows else None


def make_batch(case: SamplerCase, logits: Tensor, device: str = "cpu") -> SamplingBatch:
    """Return what the sampler gets beside the logits."""
    rows = case.rows

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    drawn = [row for row in rows if row.temperature > 0]
    more, size = case.more_flags, case.vocab_size
    suppressed = suppressed_of(case, logits)
    if suppressed is not None:
        suppressed = (suppressed[0].to(device), suppressed[1].to(device))
    return SamplingBatch(
        temperature=column([row.temperature for row in rows], torch.float32),
        top_k=column([top_k_of(row, size) for row in rows], torch.int64),
        top_p=column([row.top_p for row in rows], torch.float32),
        min_p=column([row.min_p for row in rows], torch.float32),
        seed=column([row.seed for row in rows], torch.int64),
        child_index=column([row.child for row in rows], torch.int64),
        position=column([row.position for row in rows], torch.int64),
        rows=column([len(rows) - 1 - i for i in range(len(rows))], torch.int32),
        all_greedy=not drawn and not more,
        any_greedy=len(drawn) < len(rows) or more,
        any_top_k=more or any(top_k_of(row, size) < size for row in drawn),
        any_top_p=more or any(row.top_p < 1 for row in drawn),
        any_min_p=more or any(row.min_p > 0 for row in drawn),
        suppressed=suppressed,
    )


def top_k_of(row: Row, vocab_size: int) -> int:
    """Return the row's top_k as a batch has it: the vocabulary's size where it is off."""
    return vocab_size if row.top_k is None else min(row.top_k, vocab_size)


def chi_square_limit(freedom: int) -> float:
    """Return what a chi-square exceeds once in ten million. Source: Wilson and Hilferty, 1931."""
    ratio = 2 / (9 * max(freedom, 1))
    return max(freedom, 1) * (1 - ratio + 5.2 * math.sqrt(ratio)) ** 3
