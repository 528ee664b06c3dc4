"""Attention over whole sequences as a formula, right or with one known mistake; and the bound.

Nothing here knows of a backend: keys and values of a sequence lie side by side.
"""

from __future__ import annotations

import math

import attrs
import torch
from attrs import define, frozen
from torch import Tensor

from quire.layers.quantized_cache import dequantize, quantize
from quire.testing.attention_cases import Case, Inputs, first_visible, make_tables
from quire.testing.bound import bound, unit_of

# Scores whose rounding is looked at, at least, before an error counts as usual or not; and how
# many numbers that may take at a time.
NUM_SAMPLES = 512
MOST_NUMBERS = 2**22


@frozen(kw_only=True)
class Mistake:
    """One thing that kernels get wrong; the defaults are right.

    `heads`: how a query's head finds its KV head: "divide", "modulo" or "first". `blocks`: how a
    position finds its block: "table", "in a row" from the first one, or "next row" of the table.
    `tail`: the rest of the last block is seen. `cap_first`: the cap is taken before the scale.
    `kv_scales`: how stored numbers become keys and values: by their "own" scales, by those
    "squared", "none", those of the "next head", or those of the "other" of the two.
    `without_rotated`: of latents, that part is left out of the scores. `values_at_end`: a latent's
    last numbers are its value, instead of its first.
    """

    words: str = ""
    scale_power: int = 1
    window_shift: int = 0
    causal_shift: int = 0
    heads: str = "divide"
    blocks: str = "table"
    tail: bool = False
    swapped: bool = False
    without_softcap: bool = False
    without_sinks: bool = False
    without_alibi: bool = False
    cap_first: bool = False
    kv_scales: str = "own"
    without_rotated: bool = False
    values_at_end: bool = False

    @property
    def reads_elsewhere(self) -> bool:
        """Whether keys come from other places in memory than they should."""
        return self.tail or self.blocks != "table"


RIGHT = Mistake()


@define(kw_only=True)
class Memory:
    """Keys and values by slot, as a right backend leaves them; zero where nothing was written."""

    k: Tensor
    v: Tensor
    tables: list[list[int]]


def memory_of(case: Case, inputs: Inputs) -> Memory:
    """Lay the keys and values that a step may read into their slots."""
    size, (tables, num_blocks) = case.spec.block_size, make_tables(case)
    k = inputs.k[0].new_zeros(num_blocks * size, *inputs.k[0].shape[1:])
    v = inputs.v[0].new_zeros(num_blocks * size, *inputs.v[0].shape[1:])
    for i, (query_len, seq_len) in enumerate(case.lengths):
        positions = torch.arange(first_visible(case, query_len, seq_len), seq_len)
        slots = torch.tensor(tables[i])[positions // size] * size + positions % size
        k[slots], v[slots] = inputs.k[i][positions], inputs.v[i][positions]
    return Memory(k=k, v=v, tables=tables)


def keys_and_values(case: Case, inputs: Inputs, i: int, mistake: Mistake) -> tuple[Tensor, Tensor]:
    """Return [..., keys, num_kv_heads, dim] of sequence i."""
    k, v = inputs.k[i], inputs.v[i]
    if mistake.reads_elsewhere:
        memory, size = memory_of(case, inputs), case.spec.block_size
        num_blocks = -(-case.lengths[i][1] // size)
        length = num_blocks * size if mistake.tail else case.lengths[i][1]
        row = (i + 1) % len(memory.tables) if mistake.blocks == "next row" else i
        table = (memory.tables[row] + [0] * num_blocks)[:num_blocks]
        if mistake.blocks == "in a row":
            table = [(table[0] + n) % (len(memory.k) // size) for n in range(num_blocks)]
        positions = torch.arange(length)
        slots = torch.tensor(table)[positions // size] * size + positions % size
        k, v = memory.k[slots], memory.v[slots]
    k, v = stored_values(case, inputs, k, v, mistake)
    if case.spec.latent is not None:
        k, v = _mistaken_latents(k, v, mistake)
    return (v, k) if mistake.swapped else (k, v)


def _mistaken_latents(k: Tensor, v: Tensor, mistake: Mistake) -> tuple[Tensor, Tensor]:
    rank = v.shape[-1]
    v = k[..., -rank:] if mistake.values_at_end else v
    if mistake.without_rotated:
        k = torch.cat((k[..., :rank], torch.zeros_like(k[..., rank:])), -1)
    return k, v


def stored_values(
    case: Case, inputs: Inputs, k: Tensor, v: Tensor, mistake: Mistake = RIGHT
) -> tuple[Tensor, Tensor]:
    """Return what the cache stands for once `k` and `v` [..., num_kv_heads, dim] are written."""
    k_scale, v_scale = inputs.k_scale, inputs.v_scale
    if k_scale is None or v_scale is None:
        return k, v
    used = {
        "own": (k_scale, v_scale),
        "squared": (k_scale**2, v_scale**2),
        "none": (torch.ones_like(k_scale), torch.ones_like(v_scale)),
        "next head": (k_scale.roll(-1), v_scale.roll(-1)),
        "other": (v_scale, k_scale),
    }[mistake.kv_scales]
    dtype = getattr(torch, case.spec.kv_dtype)
    pairs = zip((k, v), (k_scale, v_scale), used, strict=True)
    k, v = (dequantize(quantize(x, own, dtype), by, torch.float64) for x, own, by in pairs)
    return k, v


def _per_head(x: Tensor, case: Case, mistake: Mistake) -> Tensor:
    """Return [..., num_heads, keys, dim] of [..., keys, num_kv_heads, dim]."""
    spec, heads = case.spec, torch.arange(case.spec.num_heads)
    found = {
        "divide": heads // (spec.num_heads // spec.num_kv_heads),
        "modulo": heads % spec.num_kv_heads,
        "first": heads * 0,
    }
    return x.transpose(-3, -2).index_select(-3, found[mistake.heads])


def scores_of(
    case: Case, inputs: Inputs, i: int, dtype: torch.dtype, mistake: Mistake = RIGHT
) -> Tensor:
    """Return the masked scores [..., heads, queries, keys] of sequence i."""
    spec, (query_len, seq_len) = case.spec, case.lengths[i]
    k, _ = keys_and_values(case, inputs, i, mistake)
    q = inputs.q[i].to(dtype).transpose(-3, -2)
    scores = q @ _per_head(k.to(dtype), case, mistake).mT
    cap = None if mistake.without_softcap else spec.logit_softcap
    if cap is not None and mistake.cap_first:
        scores = torch.tanh(scores / cap) * cap
    scores = scores * spec.scale**mistake.scale_power
    if cap is not None and not mistake.cap_first:
        scores = torch.tanh(scores / cap) * cap
    queries = torch.arange(seq_len - query_len, seq_len)
    distance = queries[:, None] - torch.arange(k.shape[-3])
    if inputs.alibi is not None and not mistake.without_alibi:
        scores = scores - (inputs.alibi[:, None, None] * distance).to(dtype)
    return scores.masked_fill(~_visible(case, distance, seq_len, mistake), -math.inf)


def _visible(case: Case, distance: Tensor, seq_len: int, mistake: Mistake) -> Tensor:
    """Return which keys each query sees, from position of query minus position of key."""
    visible = torch.ones_like(distance, dtype=torch.bool)
    if mistake.tail:
        # Behind the last token there is nothing to compare a position with.
        visible[:, :seq_len] &= distance[:, :seq_len] >= 0
    elif case.spec.causal:
        visible = distance >= mistake.causal_shift
    if case.spec.sliding_window is not None:
        visible &= distance < case.spec.sliding_window + mistake.window_shift
    return visible


def attended(
    case: Case, inputs: Inputs, i: int, dtype: torch.dtype, mistake: Mistake = RIGHT
) -> tuple[Tensor, Tensor]:
    """Return [..., queries, heads, value_head_dim] and log-sum-exp [..., queries, heads]."""
    scores = scores_of(case, inputs, i, dtype, mistake)
    num_keys = scores.shape[-1]
    if inputs.sinks is not None and not mistake.without_sinks:
        sinks = inputs.sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., :num_keys]
    _, v = keys_and_values(case, inputs, i, mistake)
    out = weights @ _per_head(v.to(dtype), case, mistake)
    return out.transpose(-3, -2), scores.logsumexp(-1).mT


def attention(
    case: Case, inputs: Inputs, dtype: torch.dtype, mistake: Mistake = RIGHT
) -> list[Tensor]:
    """Return [queries, heads, value_head_dim] of each sequence, computed in `dtype`."""
    return [attended(case, inputs, i, dtype, mistake)[0] for i in range(len(case.lengths))]


def log_sums(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Return the log-sum-exp of the scores, sinks included, [queries, heads] of each sequence."""
    return [attended(case, inputs, i, dtype)[1] for i in range(len(case.lengths))]


def plain_errors(case: Case, inputs: Inputs, *, rounds: int = 1) -> tuple[float, float]:
    """Return the worst errors of plain PyTorch in the case's dtype: of outputs, of log-sums.

    A small case may come out better than the dtype promises by luck, so it is computed with the
    head dimensions in several orders, which changes the rounding and nothing else; `rounds` times
    as many, half of them with the scale in q.
    """
    generator = torch.Generator().manual_seed(0)
    dtype, spec = getattr(torch, case.spec.dtype), case.spec
    num_scores = sum(query_len for query_len, _ in case.lengths) * spec.num_heads
    longest = max(seq_len for _, seq_len in case.lengths)
    most = MOST_NUMBERS // (spec.num_heads * longest * max(spec.head_dim, spec.value_head_dim))
    num_orders = max(3, min(NUM_SAMPLES // num_scores, most))
    scaled = attrs.evolve(case, spec=attrs.evolve(spec, scale=1.0))
    worst = [0.0, 0.0]
    for number in range(rounds):
        orders = torch.stack(
            [torch.randperm(spec.head_dim, generator=generator) for _ in range(num_orders)]
        )
        is_scaled = number % 2 == 1
        turned = attrs.evolve(
            inputs,
            q=[_in_orders(q, orders) * (spec.scale if is_scaled else 1) for q in inputs.q],
            k=[_in_orders(k, orders) for k in inputs.k],
        )
        for i in range(len(case.lengths)):
            exact = attended(case, inputs, i, torch.float64)
            found = attended(scaled if is_scaled else case, turned, i, dtype)
            errors = [
                (f.double() - e).abs().max().item() for f, e in zip(found, exact, strict=True)
            ]
            worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst[0], worst[1]


def _in_orders(x: Tensor, orders: Tensor) -> Tensor:
    """Return [orders, tokens, heads, dim]."""
    return x[..., orders].movedim(-2, 0).contiguous()


@define(kw_only=True)
class Verdict:
    """Whether numbers are within the bound; `wrong` [tokens, heads] marks those that are not."""

    error: float
    allowed: float
    wrong: Tensor

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not bool(self.wrong.any())


def judge(case: Case, inputs: Inputs, out: list[Tensor], exact: list[Tensor]) -> Verdict:
    """Allow twice the error of plain PyTorch, plus one rounding unit of the output's dtype."""
    difference = (torch.cat(out).double() - torch.cat(exact)).abs()
    unit = unit_of(getattr(torch, case.spec.dtype), torch.cat(exact))
    allowed = _allowed(case, inputs, difference, unit, which=0)
    error = difference.max().item()
    return Verdict(error=error, allowed=allowed, wrong=~(difference <= allowed).all(-1))


def judge_log_sums(case: Case, inputs: Inputs, lse: Tensor) -> Verdict:
    """Judge `lse` [tokens, heads]; it is float32 whatever the model's dtype."""
    exact = torch.cat(log_sums(case, inputs, torch.float64))
    difference, unit = (lse.double() - exact).abs(), unit_of(torch.float32, exact)
    allowed = _allowed(case, inputs, difference, unit, which=1)
    wrong = ~(difference <= allowed)
    return Verdict(error=difference.max().item(), allowed=allowed, wrong=wrong)


def _allowed(case: Case, inputs: Inputs, difference: Tensor, unit: float, *, which: int) -> float:
    """Return the bound; plain PyTorch's error is looked at as closely as the verdict needs."""
    return bound(
        difference.max().item(),
        unit,
        lambda rounds: plain_errors(case, inputs, rounds=rounds)[which],
    )


def check_within_bound(case: Case, inputs: Inputs, out: list[Tensor]) -> None:
    """Fail unless the error is at most twice plain PyTorch's, plus one rounding unit."""
    verdict = judge(case, inputs, out, attention(case, inputs, torch.float64))
    assert verdict.is_right, f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g} in {case}"
