"""Say what is wrong in words: the case, the first wrong number, and a guess at the cause.

A guess is a formula: attention is computed again with one known mistake, and where that explains
what came out, the mistake is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from quire.testing.attention_cases import Case, Inputs, make_inputs
from quire.testing.attention_run import Subject, run
from quire.testing.dense import RIGHT, Mistake, Verdict, attended, attention, judge

MISTAKES = [
    Mistake(words="the scale is missing", scale_power=0),
    Mistake(words="the scale is applied twice (squared)", scale_power=2),
    Mistake(words="the window is one token too long (off by one)", window_shift=1),
    Mistake(words="the window is one token too short (off by one)", window_shift=-1),
    Mistake(words="the window is ignored", window_shift=10**6),
    Mistake(words="the causal mask is off by one: the next token is seen", causal_shift=-1),
    Mistake(words="the causal mask is off by one: a token does not see itself", causal_shift=1),
    Mistake(words="there is no causal mask", causal_shift=-(10**6)),
    Mistake(
        words="heads are mapped by modulo (head % num_kv_heads) instead of by division",
        heads="modulo",
    ),
    Mistake(words="all heads read the first KV head", heads="first"),
    Mistake(words="the soft cap is ignored", without_softcap=True),
    Mistake(words="the soft cap is taken before the scale", cap_first=True),
    Mistake(words="the sinks are ignored", without_sinks=True),
    Mistake(words="ALiBi is ignored", without_alibi=True),
    Mistake(words="values and keys are swapped", swapped=True),
    Mistake(words="the scales of the quantized cache are ignored", kv_scales="none"),
    Mistake(words="the scales of the quantized cache are applied twice", kv_scales="squared"),
    Mistake(words="the cache is read with another head's scales", kv_scales="next head"),
    Mistake(words="keys are read with the values' scales, or the reverse", kv_scales="other"),
    Mistake(words="a latent's rotated part is left out of the scores", without_rotated=True),
    Mistake(words="values are a latent's last numbers, not its first", values_at_end=True),
    Mistake(words="the tail of the last block is not masked", tail=True),
    Mistake(words="blocks are read in a row, not by the block table", blocks="in a row"),
    Mistake(words="another sequence's row of the block table is read", blocks="next row"),
]
# What a plainer case has not, and what is wrong where that one comes out right.
NEEDED: list[tuple[dict[str, Any], str]] = [
    ({"groups_before": 0}, "the tensors of another group of the batch are read"),
    (
        {"spare_columns": 0},
        "the width of the block table is guessed, or what is behind a sequence's blocks read",
    ),
    (
        {"moved": False},
        "what belongs to a block is kept outside of the cache, where copies of blocks lose it",
    ),
    ({"strided": False}, "the strides of q, k or v are ignored"),
    ({"shared_blocks": 0}, "blocks that sequences share are not read by all of them"),
]
STALE = "something is kept from an earlier step (a stale plan)"
SHIFTED = {
    True: "exponentials are infinite: the maximum of the scores is not taken off",
    False: "all exponentials are zero: the maximum is not taken off, or does not begin at -inf",
}


def guess_output(subject: Subject, cases: Sequence[Case]) -> str | None:
    """Return what may be wrong with the outputs of cases that failed, the smallest one first.

    A small case may be explained by several mistakes: the one that explains most of them is taken.
    """
    smallest, inputs = cases[0], make_inputs(cases[0])
    fresh = _outputs(subject, smallest, inputs, fresh=True)
    if fresh is not None and _judged(smallest, inputs, fresh).is_right:
        return STALE
    needed = _what_it_needs(subject, smallest)
    if needed is not None:
        return needed
    seen, unwritten = [], None
    for case in cases:
        # Poison hides what was computed; with zeros in its place a formula may explain it.
        clean = attrs.evolve(case, poison="zero")
        inputs = make_inputs(clean)
        found = _outputs(subject, clean, inputs)
        if found is not None:
            seen.append(_Seen(case=clean, inputs=inputs, out=found))
            if torch.cat(found).isnan().any():
                unwritten = unwritten or _guess_unwritten(torch.cat(found))
    return _explanation(seen) or unwritten


def _explanation(seen: list[_Seen]) -> str | None:
    """Return the mistake that explains the first case, and most of them all."""
    counts = {
        mistake.words: 1 + sum(_gives(mistake, one) for one in seen[1:])
        for mistake in MISTAKES
        if seen and _gives(mistake, seen[0])
    }
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best is not None and 2 * counts[best] > len(seen) else None


def _what_it_needs(subject: Subject, case: Case) -> str | None:
    """Return what is wrong where the same case with less in it comes out right."""
    plainer = [(attrs.evolve(case, **less), words) for less, words in NEEDED]
    plainer.append((attrs.evolve(case, shift=0.0), SHIFTED[case.shift > 0]))
    for other, words in plainer:
        if other != case:
            inputs = make_inputs(other)
            found = _outputs(subject, other, inputs)
            if found is not None and _judged(other, inputs, found).is_right:
                return words
    return None


def _guess_unwritten(out: Tensor) -> str:
    rows = out.isnan().flatten(1).all(1)
    if bool(rows.any()) and not bool(out[~rows].isnan().any()):
        return "rows are left unwritten, or a row's sums are 0/0"
    return "some elements of a row are left unwritten, or computed from NaN"


def _outputs(
    subject: Subject, case: Case, inputs: Inputs, *, fresh: bool = False
) -> list[Tensor] | None:
    try:
        return run(subject.backend, case, inputs, options=subject.options, fresh=fresh).out
    except (Exception, SystemExit):  # noqa: BLE001 - another error than the one that is explained
        return None


def _judged(case: Case, inputs: Inputs, out: list[Tensor], mistake: Mistake = RIGHT) -> Verdict:
    return judge(case, inputs, out, attention(case, inputs, torch.float64, mistake))


@frozen(kw_only=True)
class _Seen:
    """A case with what a backend gave for it."""

    case: Case
    inputs: Inputs
    out: list[Tensor]


def explain(case: Case, inputs: Inputs, out: list[Tensor]) -> str | None:
    """Return the words of the first known mistake that gives `out`; None where none does."""
    one = _Seen(case=case, inputs=inputs, out=out)
    return next((mistake.words for mistake in MISTAKES if _gives(mistake, one)), None)


def _gives(mistake: Mistake, one: _Seen) -> bool:
    """Answer whether a mistake gives what came out; what is right did not."""
    if not _applies(one.case, mistake):
        return False
    expected = torch.cat(attention(one.case, one.inputs, torch.float64, mistake))
    found = torch.cat(one.out).double()
    # A mistake may make scores large and rounding with them: it is recognised, not judged.
    is_single = one.case.spec.dtype == "float32"
    units = 64 + 4 * abs(one.case.shift) if is_single else 6
    unit = units * torch.finfo(getattr(torch, one.case.spec.dtype)).eps
    near = unit * max(1.0, expected.nan_to_num().abs().max().item())
    # A row that sees nothing is 0/0 in the formula, and zero in many a kernel.
    is_same = (found - expected).abs() <= near
    return bool((is_same | (expected.isnan() & (found.isnan() | (found == 0)))).all())


def _applies(case: Case, mistake: Mistake) -> bool:
    """Answer whether a mistake could change anything in a case."""
    spec = case.spec
    impossible = [
        mistake.window_shift and spec.sliding_window is None,
        (mistake.without_softcap or mistake.cap_first) and spec.logit_softcap is None,
        mistake.without_sinks and not spec.sinks,
        mistake.without_alibi and not spec.alibi,
        mistake.swapped and spec.head_dim != spec.value_head_dim,
        mistake.causal_shift and not spec.causal,
        mistake.heads == "modulo" and spec.num_heads == spec.num_kv_heads,
        mistake.blocks == "next row" and len(case.lengths) == 1,
        mistake.reads_elsewhere and spec.alibi,
        mistake.kv_scales != "own" and not spec.has_quantized_kv,
        mistake.kv_scales == "next head" and spec.num_kv_heads == 1,
        (mistake.without_rotated or mistake.values_at_end) and spec.latent is None,
    ]
    return not any(impossible)


def first_wrong(case: Case, verdict: Verdict, found: Tensor, exact: Tensor) -> str:
    """Return sequence, position, head and numbers of the first wrong element, in words.

    `found` and `exact` are [tokens, heads] or [tokens, heads, value_head_dim].
    """
    token, head = verdict.wrong.nonzero()[0].tolist()
    sequence, row = 0, token
    while row >= case.lengths[sequence][0]:
        row -= case.lengths[sequence][0]
        sequence += 1
    query_len, seq_len = case.lengths[sequence]
    position = seq_len - query_len + row
    got, expected = found[token, head].double(), exact[token, head]
    where = f"sequence {sequence}, position {position}, head {head}"
    if got.dim():
        # A NaN is the worst of all.
        worst = (got - expected).abs().nan_to_num(float("inf")).argmax()
        where += f", dimension {worst.item()}"
        got, expected = got[worst], expected[worst]
    wrong = f"{int(verdict.wrong.sum())} of {verdict.wrong.numel()} (token, head) pairs are wrong"
    return (
        f"{where}: got {got.item():.6g}, expected {expected.item():.6g}, "
        f"bound {verdict.allowed:.3g}; {wrong}"
    )


def guess_log_sum(case: Case, inputs: Inputs, lse: Tensor) -> str | None:
    """Return what may be wrong with the log-sum-exp [tokens, heads]."""
    if lse.isnan().any():
        return "lse is not written everywhere"
    exact = torch.cat(
        [attended(case, inputs, i, torch.float64)[1] for i in range(len(case.lengths))]
    )
    near = 1e-2 * (1 + exact.abs().max())
    if bool(((lse * 0.6931471805599453 - exact).abs() <= near).all()):
        return "the logarithm is to base 2"
    if inputs.sinks is not None:
        bare = attrs.evolve(inputs, sinks=None)
        sums = [attended(case, bare, i, torch.float64)[1] for i in range(len(case.lengths))]
        if bool(((lse - torch.cat(sums)).abs() <= near).all()):
            return "the sinks are not in it"
    return None
