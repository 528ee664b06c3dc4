"""What must hold of a sampler: one function a check, which judges one case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from attrs import evolve, frozen
from torch import Tensor

from quire.interfaces.sampling import RowStatus, SampledTokens, Sampler, SamplingBatch
from quire.testing.kit_report import Failure
from quire.testing.sampler_cases import (
    BESIDE,
    Row,
    SamplerCase,
    chi_square_limit,
    laid_out,
    make_batch,
    make_logits,
)
from quire.testing.sampler_formula import EPS, MISTAKES, RIGHT, Draws, Mistake, allowed, draw

# How often one row is drawn where its tokens are judged one by one.
NUM_POSITIONS = 64
DEPENDS = "the draw depends on the batch"


@frozen(kw_only=True)
class SamplerSubject:
    """The sampler that is checked, where, and how often a row is drawn to count its tokens."""

    sampler: type[Sampler]
    device: str = "cpu"
    num_draws: int = 2000


@frozen(kw_only=True)
class Sampled:
    """What a sampler gave, on the CPU, and the logits with the suppressed tokens taken out."""

    logits: Tensor
    tokens: list[int]
    status: list[int]
    logprobs: Tensor | None
    wrong: str | None


def sample(subject: SamplerSubject, case: SamplerCase) -> Sampled:
    """Run the sampler, and look at the form of what it gives and at what it changes."""
    logits = make_logits(case)
    batch = make_batch(case, logits, subject.device)
    given, whole = laid_out(case, logits, subject.device)
    watched = _watched(batch)
    copies = {name: tensor.clone() for name, tensor in watched.items()}
    done = subject.sampler().sample(given, batch)
    changed = [f"{n} was changed" for n, t in copies.items() if not torch.equal(watched[n], t)]
    if bool((_beside(case, whole) != BESIDE).any()):
        changed.append("memory beside the logits was changed")
    left = logits.clone()
    if batch.suppressed is not None:
        left[batch.suppressed[0].cpu(), batch.suppressed[1].cpu()] = -math.inf
    wrong = _judge_form(case, done) or next(iter(changed), None)
    return Sampled(
        logits=left,
        tokens=done.token_ids[:, 0].tolist() if wrong is None else [],
        status=done.status.tolist() if wrong is None else [],
        logprobs=None if done.logprobs is None else done.logprobs.cpu(),
        wrong=wrong,
    )


def _watched(batch: SamplingBatch) -> dict[str, Tensor]:
    fields = attrs.asdict(batch, recurse=False)
    found = {f"batch.{n}": value for n, value in fields.items() if isinstance(value, Tensor)}
    for i, tensor in enumerate(batch.suppressed or ()):
        found[f"batch.suppressed[{i}]"] = tensor
    return found


def _beside(case: SamplerCase, whole: Tensor) -> Tensor:
    """Return the memory that is not the logits."""
    if case.layout == "rows apart":
        return whole[:, case.vocab_size :]
    return whole[:, 1::2] if case.layout == "columns apart" else whole[:, :0]


def _judge_form(case: SamplerCase, done: SampledTokens) -> str | None:
    """Return what is wrong with shapes and dtypes."""
    rows = len(case.rows)
    wanted = {
        "token_ids": (done.token_ids, torch.int64, 2),
        "status": (done.status, torch.int32, 1),
        "num_tokens": (done.num_tokens, torch.int32, 1),
        "logprobs": (done.logprobs, torch.float32, 2),
    }
    for name, (tensor, dtype, dims) in wanted.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.dim() != dims or tensor.shape[0] != rows:
            shape = "[num_rows, k]" if dims == 2 else "[num_rows]"
            found = f"{tensor.dtype} {list(tensor.shape)}"
            return f"{name} is {found}; it must be {dtype} {shape} with num_rows {rows}"
    if done.num_tokens is not None and not bool((done.num_tokens >= 1).all()):
        return "num_tokens is below 1; a sampler draws at least one token a row"
    return None


def check_draws(subject: SamplerSubject, case: SamplerCase) -> Failure | None:
    """Every row gets the token and the status that its own inputs say."""
    done = sample(subject, case)
    if done.wrong is not None:
        return Failure(what=done.wrong, case=case)
    for i, row in enumerate(case.rows):
        what = _judge_row(case, done, i, row)
        if what is not None:
            return Failure(what=f"row {i}, {what}", case=case)
    return None


def _judge_row(case: SamplerCase, done: Sampled, i: int, row: Row) -> str | None:
    """Return what is wrong with a row, in words."""
    token, status, logits = done.tokens[i], done.status[i], done.logits[i]
    expected = RowStatus.NOT_FINITE if row.bad else RowStatus.OK
    if status != expected:
        reason = row.bad or "finite logits"
        return f"{reason}: status {status} instead of {int(expected)} ({expected.name})"
    if row.bad:
        return None
    if not 0 <= token < case.vocab_size:
        return f"token {token} is not below vocab_size {case.vocab_size}, and the status says OK"
    if row.temperature == 0:
        best = int(logits.argmax())
        if token == best:
            return None
        tie = ", and the lowest id counts among equals" if logits[token] == logits[best] else ""
        return (
            f"greedy: token {token} of logit {logits[token].item():.6g} instead of token {best} "
            f"of {logits[best].item():.6g}{tie}"
        )
    found = draw(logits, row)
    if not bool(found.may_be(torch.tensor([token]))):
        return _in_words(row, found, 0, token)
    return _judge_logprob(case, done, i, row)


def _in_words(row: Row, found: Draws, i: int, token: int) -> str:
    best, scores = int(found.best[i]), found.scores[i]
    if not bool(found.allowed.perhaps[token]):
        return f"token {token}, which the filters drop, instead of token {best} ({row})"
    groups = [one // found.group_size for one in (token, best)]
    if groups[0] == groups[1]:
        told = [f"score {scores[one].item():.6g}" for one in (token, best)]
    else:
        told = [f"group {group} of score {found.low[i, group].item():.6g}" for group in groups]
    return f"token {token} of {told[0]} instead of token {best} of {told[1]} ({row})"


def _judge_logprob(case: SamplerCase, done: Sampled, i: int, row: Row) -> str | None:
    """Judge the log-probability of a drawn token, where the sampler gives one."""
    if done.logprobs is None:
        return None
    found = allowed(done.logits[i], row)
    if not found.is_clear:
        return None
    kept = found.scaled.masked_fill(~found.surely, -math.inf)
    exact = kept.log_softmax(0)[done.tokens[i]].item()
    plain = kept.float().log_softmax(0)[done.tokens[i]].item()
    limit = 2 * abs(plain - exact) + EPS * max(1.0, kept[found.surely].abs().max().item())
    got = done.logprobs[i, 0].item()
    if abs(got - exact) <= limit:
        return None
    return f"logprob {got:.6g} instead of {exact:.6g}, bound {limit:.3g} ({row})"


def check_alone(subject: SamplerSubject, case: SamplerCase) -> Failure | None:
    """A row gives the same token alone, in a batch, and at another place of it."""
    done = sample(subject, case)
    rows, size = case.rows, len(case.rows)
    if done.wrong is not None or size < 2:
        return None
    logits = make_logits(case)
    batch = make_batch(case, logits, subject.device)
    if batch.suppressed is not None:
        return None
    kept = subject.sampler()
    kept.sample(logits.to(subject.device), batch)
    for order in ([*range(1, size), 0], *([i] for i in range(size))):
        part = evolve(case, rows=tuple(rows[i] for i in order), more_flags=case.more_flags)
        own = make_batch(part, logits[order], subject.device)
        tokens, fresh = (
            sampler.sample(logits[order].to(subject.device), own).token_ids[:, 0].tolist()
            for sampler in (kept, subject.sampler())
        )
        for at, i in enumerate(order):
            if not rows[i].bad and tokens[at] != done.tokens[i]:
                where = "alone" if len(order) == 1 else f"as row {at} of {size}"
                what = f"row {i}: token {done.tokens[i]} in the batch, token {tokens[at]} {where}"
                is_kept = fresh[at] == done.tokens[i]
                guess = "something is kept from an earlier step" if is_kept else DEPENDS
                return Failure(what=what, case=case, guess=guess)
    return None


@frozen(kw_only=True)
class _Many:
    """One row drawn many times, at positions in a row: what is drawn from, and the tokens."""

    case: SamplerCase
    logits: Tensor
    tokens: Tensor

    @property
    def row(self) -> Row:
        """The first of the rows."""
        return self.case.rows[0]


def _drawn_row(case: SamplerCase) -> SamplerCase:
    """Return the case of its first row alone, drawn."""
    row = evolve(case.rows[0], bad="", suppressed=0)
    row = evolve(row, temperature=row.temperature or 1.0)
    return evolve(case, rows=(row,), layout="contiguous")


def _many(
    subject: SamplerSubject, one: SamplerCase, num_draws: int, what: str = "position", step: int = 1
) -> _Many:
    """Draw a row many times, with a seed, child or position after the other."""
    row = one.rows[0]
    start: Any = getattr(row, what)
    rows = [evolve(row, **{what: start + i * step}) for i in range(num_draws)]
    logits = make_logits(one).expand(num_draws, -1).contiguous()
    batch = make_batch(evolve(one, rows=tuple(rows)), logits, subject.device)
    done = subject.sampler().sample(logits.clone().to(subject.device), batch)
    tokens = done.token_ids[:, 0].cpu().clamp(0, one.vocab_size - 1)
    return _Many(case=one, logits=logits[0], tokens=tokens)


def check_filters(subject: SamplerSubject, case: SamplerCase) -> Failure | None:
    """A row drawn at many positions gives what the filters leave, and what the noise says."""
    many = _many(subject, _drawn_row(case), NUM_POSITIONS)
    found = draw(many.logits, many.row, num_draws=NUM_POSITIONS)
    right = found.may_be(many.tokens)
    if bool(right.all()):
        return None
    at = int((~right).nonzero()[0])
    words = _in_words(many.row, found, at, int(many.tokens[at]))
    what = f"draw {at} of {NUM_POSITIONS} positions in a row: {words}"
    return Failure(what=what, case=many.case)


def guess_draws(subject: SamplerSubject, cases: Sequence[SamplerCase]) -> str | None:
    """Return what may be wrong with draws that failed: the mistake that explains them all.

    Their rows are drawn again at many positions: of other logits, at another temperature, without
    top_k.
    """
    drawn = [
        (case, row)
        for case in cases[:4]
        for row in case.rows
        if row.temperature > 0 and not row.bad
    ]
    failed = [
        evolve(case, rows=(other,), seed=case.seed + more)
        for case, row in drawn
        for more, other in enumerate((row, evolve(row, temperature=1.0), evolve(row, top_k=None)))
    ]
    seen = [_many(subject, _drawn_row(case), NUM_POSITIONS) for case in failed]
    # What is right by itself has no explanation: it is something else that is wrong.
    if all(_gives(RIGHT, many) for many in seen):
        return None
    for mistake in MISTAKES:
        if all(_gives(mistake, many) for many in seen):
            return mistake.words
    return None


def _gives(mistake: Mistake, many: _Many) -> bool:
    """Answer whether a mistake gives all tokens of a row."""
    found = draw(many.logits, many.row, mistake, num_draws=NUM_POSITIONS)
    return bool(found.may_be(many.tokens).all())


def check_distribution(subject: SamplerSubject, case: SamplerCase) -> Failure | None:
    """Over many seeds, children or positions, tokens come as often as their probability says."""
    one, what = _drawn_row(case), ("seed", "child", "position")[case.seed % 3]
    # Neighbours in the seed's lower and upper half.
    one = evolve(one, rows=(evolve(one.rows[0], seed=one.rows[0].seed % 2**31),))
    found = allowed(make_logits(one)[0], one.rows[0])
    if not found.is_clear:
        return None
    many = _many(subject, one, subject.num_draws, what, 0x1_0000_0001 if what == "seed" else 1)
    kept = found.scaled.masked_fill(~found.surely, -math.inf)
    expected = subject.num_draws * kept.softmax(0)
    counts = torch.bincount(many.tokens, minlength=case.vocab_size).double()
    # Rare tokens are counted together.
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    if expected[-1] < 5:
        expected, counts = expected[:-1], counts[:-1]
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    limit = chi_square_limit(len(expected) - 1)
    if chi_square <= limit:
        return None
    text = f"over {subject.num_draws} {what}s chi-square is {chi_square:.4g}, above {limit:.4g}"
    return Failure(what=text, case=one, guess=f"draws of one {what} and the next are not apart")


def check_graph(subject: SamplerSubject, case: SamplerCase) -> Failure | None:
    """A captured draw serves other rows than it was captured with."""
    captured = evolve(case, more_flags=True, layout="contiguous")
    captured = evolve(captured, rows=tuple(evolve(row, suppressed=0) for row in case.rows))
    if not case.rows:
        return None
    logits = make_logits(captured)
    batch, given = make_batch(captured, logits, subject.device), logits.to(subject.device)
    sampler, stream = subject.sampler(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sampler.sample(given.clone(), batch)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        done = sampler.sample(given, batch)
    turned = captured.rows[1:] + captured.rows[:1]
    other = evolve(captured, rows=turned, seed=case.seed + 1)
    again = make_logits(other)
    given.copy_(again)
    fresh = _watched(make_batch(other, again, subject.device))
    for name, tensor in _watched(batch).items():
        tensor.copy_(fresh[name])
    graph.replay()
    tokens, status = done.token_ids[:, 0].tolist(), done.status.tolist()
    seen = Sampled(logits=again, tokens=tokens, status=status, logprobs=None, wrong=None)
    for i, row in enumerate(other.rows):
        what = _judge_row(other, seen, i, row)
        if what is not None:
            guess = "the capture keeps what it saw on the host"
            return Failure(what=f"replayed: row {i}, {what}", case=other, guess=guess)
    return None
