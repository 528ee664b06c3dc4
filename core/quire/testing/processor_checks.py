"""What must hold of a logits processor: one function a check, which judges one case."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from attrs import Factory, evolve, field, frozen
from torch import Tensor

from quire.errors import RequestError
from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.request import SamplingParams
from quire.testing.bound import bound, first_beyond, same_bits, unit_of
from quire.testing.kit_report import Failure

MAX_NUM_SEQS = 8
MAX_LEN = 24
# What lies in the history behind a row's tokens.
STALE = 3
Expected = Callable[[Tensor, list[int], int, Any], Tensor | None]


@frozen(kw_only=True)
class ProcessorSubject:
    """The processor that is checked.

    `arguments` are what requests may give it, `bad_arguments` what `check_arguments` must refuse.
    `expected(logits, tokens, num_prompt_tokens, arguments)` gives the float64 logits of one row
    where the author has a formula.
    """

    processor: type[LogitsProcessor]
    arguments: Sequence[Any] = field(default=(True,))
    bad_arguments: Sequence[Any] = Factory(tuple)
    expected: Expected | None = None
    device: str = "cpu"


@frozen(kw_only=True)
class ProcessorRow:
    """A row: the number of its arguments (None: it asks for nothing), and its tokens."""

    asks: int | None
    num_prompt: int
    num_output: int


@frozen(kw_only=True)
class ProcessorCase:
    """A batch of rows over one vocabulary."""

    rows: tuple[ProcessorRow, ...]
    vocab_size: int = 12
    dtype: str = "float32"
    strided: bool = False
    seed: int = 0

    def __str__(self) -> str:
        def words(row: ProcessorRow) -> str:
            asks = "asks for nothing" if row.asks is None else f"arguments {row.asks}"
            return f"{row.num_prompt}+{row.num_output} tokens, {asks}"

        layout = "cut from a wider tensor" if self.strided else "contiguous"
        rows = " | ".join(words(row) for row in self.rows) or "none"
        return f"{self.vocab_size} logits, {self.dtype}, {layout}; seed {self.seed}; rows: {rows}"


@frozen(kw_only=True)
class Applied:
    """What goes in by row, what came out, and what was changed that must not be."""

    given: Tensor
    out: Tensor
    tokens: list[list[int]]
    changed: str | None


def arguments_of(subject: ProcessorSubject, row: ProcessorRow) -> Any:
    """Return a copy of what a row's request gave."""
    return None if row.asks is None else copy.deepcopy(subject.arguments[row.asks])


def make_tokens(case: ProcessorCase) -> list[list[int]]:
    """Draw the tokens of each row, prompt first; each row's own."""
    generator = torch.Generator().manual_seed(case.seed)
    counts = [row.num_prompt + row.num_output for row in case.rows]
    drawn = [torch.randint(0, case.vocab_size, (n,), generator=generator) for n in counts]
    return [tokens.tolist() for tokens in drawn]


def make_state(case: ProcessorCase, rows: list[int], tokens: list[list[int]], device: str) -> Any:
    """Return the state of rows that have the given persistent numbers."""
    history = torch.full((MAX_NUM_SEQS, MAX_LEN), STALE, dtype=torch.int32)
    num_tokens = torch.zeros(MAX_NUM_SEQS, dtype=torch.int32)
    num_prompt = torch.zeros(MAX_NUM_SEQS, dtype=torch.int32)
    for row, own, one in zip(rows, tokens, case.rows, strict=True):
        history[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        num_tokens[row], num_prompt[row] = len(own), one.num_prompt
    return LogitsState(
        rows=torch.tensor(rows, dtype=torch.int32, device=device),
        token_history=history.to(device),
        num_tokens=num_tokens.to(device),
        num_prompt_tokens=num_prompt.to(device),
        host_rows=list(rows),
        host_token_ids={},
    )


def make_logits(case: ProcessorCase) -> Tensor:
    """Return the logits [rows, vocab_size]."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    logits = 3 * torch.randn(len(case.rows), case.vocab_size, generator=generator)
    return logits.to(getattr(torch, case.dtype))


def apply(
    subject: ProcessorSubject,
    case: ProcessorCase,
    processor: LogitsProcessor,
    logits: Tensor,
    rows: list[int],
    *,
    more: int = 0,
) -> Applied:
    """Apply a processor that knows the rows; each has had so many tokens `more` since."""
    tokens = [own + [(own[-1] + 1) % case.vocab_size] * more for own in make_tokens(case)]
    state = make_state(case, rows, tokens, subject.device)
    if processor.needs_host_tokens:
        state.host_token_ids = {row: list(own) for row, own in zip(rows, tokens, strict=True)}
    kept = copy.deepcopy(state)
    given = logits.to(subject.device)
    if case.strided:
        wide = torch.cat((given, given), 1)
        out = processor.apply(wide[:, : case.vocab_size], state)
    else:
        out = processor.apply(given.clone(), state)
    return Applied(given=logits, out=out.cpu(), tokens=tokens, changed=_changed(kept, state))


def _changed(kept: LogitsState, state: LogitsState) -> str | None:
    for attribute in attrs.fields(LogitsState):
        before, after = getattr(kept, attribute.name), getattr(state, attribute.name)
        is_same = torch.equal(before, after) if isinstance(before, Tensor) else before == after
        if not is_same:
            return f"state.{attribute.name} was changed; a processor may only read it"
    return None


def make(subject: ProcessorSubject, case: ProcessorCase) -> LogitsProcessor:
    """Return a processor without rows."""
    return subject.processor(case.vocab_size, MAX_NUM_SEQS, subject.device)


def add_rows(
    subject: ProcessorSubject, case: ProcessorCase, processor: LogitsProcessor, rows: list[int]
) -> None:
    """Begin to serve the rows of a case."""
    for row, one in zip(rows, case.rows, strict=True):
        processor.add_row(row, arguments_of(subject, one), params_of(subject, one))


def params_of(subject: ProcessorSubject, row: ProcessorRow) -> SamplingParams:
    """Return the parameters of a row's request."""
    given: Mapping[str, Any] = {}
    if row.asks is not None:
        given = {subject.processor.name: arguments_of(subject, row)}
    return SamplingParams(extra_args=dict(given))


def persistent(case: ProcessorCase) -> list[int]:
    """Return the persistent number of each row: none is its place in the batch."""
    return [(3 * i + 5 + case.seed) % MAX_NUM_SEQS for i in range(len(case.rows))]


def check_rows(subject: ProcessorSubject, case: ProcessorCase) -> Failure | None:
    """Rows that ask for nothing keep their bits; the others have what the formula says."""
    processor, rows = make(subject, case), persistent(case)
    add_rows(subject, case, processor, rows)
    done = apply(subject, case, processor, make_logits(case), rows)
    if done.changed is not None:
        return Failure(what=done.changed, case=case)
    if done.out.shape != done.given.shape or done.out.dtype != done.given.dtype:
        got = f"{done.out.dtype} {list(done.out.shape)}"
        what = f"apply returns {got} instead of {done.given.dtype} {list(done.given.shape)}"
        return Failure(what=what, case=case)
    for i, row in enumerate(case.rows):
        if row.asks is None and not same_bits(done.out[i], done.given[i]):
            what = f"row {i} asks for nothing, and its logits were changed"
            return Failure(what=what, case=case)
    failure = _judge_formula(subject, case, done)
    if failure is not None or subject.expected is None:
        return failure
    later = apply(subject, case, processor, make_logits(case), rows, more=1)
    failure = _judge_formula(subject, case, later)
    guess = "something is kept from the first step"
    return failure and evolve(failure, what=f"a step later: {failure.what}", guess=guess)


def _judge_formula(subject: ProcessorSubject, case: ProcessorCase, done: Applied) -> Failure | None:
    for i, row in enumerate(case.rows):
        if row.asks is None or subject.expected is None:
            continue
        given = done.given[i].double()
        arguments = arguments_of(subject, row)
        exact = subject.expected(given, done.tokens[i], row.num_prompt, arguments)
        if exact is None:
            continue
        # Infinities are compared as such.
        finite = exact.isfinite()
        if not torch.equal(done.out[i][~finite].double(), exact[~finite]):
            token = int((~finite).nonzero()[0])
            return Failure(what=f"row {i}: token {token} must be {exact[token]:g}", case=case)
        unit = unit_of(done.out.dtype, exact[finite])
        error = (done.out[i].double() - exact)[finite].abs().max().item() if finite.any() else 0.0
        allowed = bound(error, unit, lambda _, unit=unit: unit)  # type: ignore[misc]
        wrong = first_beyond(done.out[i][finite], exact[finite], allowed, ("finite logit",))
        if wrong is not None:
            return Failure(what=f"row {i}, {wrong.words}", case=case)
    return None


def check_alone(subject: ProcessorSubject, case: ProcessorCase) -> Failure | None:
    """A row comes out the same alone, at another place, and under another persistent number."""
    processor, rows = make(subject, case), persistent(case)
    add_rows(subject, case, processor, rows)
    logits, tokens = make_logits(case), make_tokens(case)
    together = apply(subject, case, processor, logits, rows).out
    for i, row in enumerate(case.rows):
        one = evolve(case, rows=(row,))
        other = make(subject, one)
        number = (rows[i] + 1) % MAX_NUM_SEQS
        add_rows(subject, one, other, [number])
        state = make_state(one, [number], [tokens[i]], subject.device)
        if other.needs_host_tokens:
            state.host_token_ids = {number: list(tokens[i])}
        alone = other.apply(logits[i : i + 1].to(subject.device), state).cpu()
        if not same_bits(alone[0], together[i]):
            what = f"row {i} comes out otherwise alone, as persistent row {number}"
            guess = "the place in the batch is taken for the persistent row, or rows are mixed"
            return Failure(what=what, case=case, guess=guess)
    return None


def check_rows_apart(subject: ProcessorSubject, case: ProcessorCase) -> Failure | None:
    """A NaN in one row does not reach another."""
    processor, rows = make(subject, case), persistent(case)
    add_rows(subject, case, processor, rows)
    logits = make_logits(case)
    bad = case.seed % len(rows)
    logits[bad] = float("nan")
    reached = apply(subject, case, processor, logits, rows).out.isnan().any(1)
    reached[bad] = False
    if not bool(reached.any()):
        return None
    return Failure(what=f"a NaN in row {bad} reaches row {int(reached.nonzero()[0])}", case=case)


def check_forgets(subject: ProcessorSubject, case: ProcessorCase) -> Failure | None:
    """A row that was removed leaves nothing to the next one of its number."""
    processor, rows = make(subject, case), persistent(case)
    add_rows(subject, case, processor, rows)
    apply(subject, case, processor, make_logits(case), rows)
    for row in rows:
        processor.remove_row(row)
    quiet = evolve(case, rows=tuple(evolve(row, asks=None) for row in case.rows))
    add_rows(subject, quiet, processor, rows)
    done = apply(subject, quiet, processor, make_logits(case), rows)
    if same_bits(done.out, done.given):
        return None
    what = "after remove_row, the next request of the same row is changed, and asks for nothing"
    return Failure(what=what, case=case, guess="remove_row, or add_row without arguments, keeps it")


def check_arguments(subject: ProcessorSubject, case: ProcessorCase) -> Failure | None:
    """What requests may give is taken, and what they may not is a RequestError."""
    for value in subject.arguments:
        params = SamplingParams(extra_args={subject.processor.name: value})
        try:
            subject.processor.check_arguments(value, params)
        except RequestError as error:
            return Failure(what=f"arguments {value!r} are refused: {error}", case=case)
    for value in subject.bad_arguments:
        params = SamplingParams(extra_args={subject.processor.name: value})
        try:
            subject.processor.check_arguments(value, params)
        except RequestError:
            continue
        return Failure(what=f"arguments {value!r} are taken; they must be refused", case=case)
    return None
