"""The kit's doors to operations: a function, a class to subclass in pytest.

The kit takes a module, or functions by their names, and imports none: an operation is told by
its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from attrs import evolve, frozen
from hypothesis import strategies as st
from torch import Tensor

from quire.interfaces.sampling import SampledTokens, Sampler, SamplingBatch
from quire.testing import search
from quire.testing.bound import bound, first_beyond, leave_poison, same_bits, unit_of
from quire.testing.kit_report import CheckResult, Failure, Profile, Report, profile_of
from quire.testing.kit_sampler import filtered_cases, rows, sampler_cases
from quire.testing.op_formulas import OPS, Arguments, Op, OpCase
from quire.testing.sampler_cases import SamplerCase, make_logits, top_k_of
from quire.testing.sampler_checks import SamplerSubject, check_draws
from quire.testing.sampler_formula import allowed

__all__ = ["Op", "OpCase", "OpsTests", "check_ops", "iter_ops"]

SIZES = [8, 64, 1, 5, 100, 256, 1000, 4096]
SMALL = 256
VOCAB_SIZES = [12, 1, 100, 1000]


@frozen(kw_only=True)
class OpSubject:
    """An operation: what is called, what it must give, and where."""

    name: str
    function: Callable[..., Any]
    op: Op
    device: str = "cpu"


def _moved(value: Any, device: str) -> Any:
    """Return a fresh copy on the device, as strided as it was."""
    if isinstance(value, Tensor):
        if value.is_contiguous() or value.dim() < 2:
            return value.to(device, copy=True)
        wide = torch.empty((*value.shape[:-1], value.stride(-2)), dtype=value.dtype, device=device)
        wide[..., : value.shape[-1]] = value.to(device)
        return wide[..., : value.shape[-1]]
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return value


def _call(subject: OpSubject, arguments: Arguments) -> tuple[Tensor, ...]:
    """Return the outputs, on the CPU; a dictionary at the end holds keyword arguments."""
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    plain = arguments[:-1] if options else arguments
    returned = subject.function(*plain, **options)
    if subject.op.outputs is not None:
        returned = subject.op.outputs(returned, arguments)
    found = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    return tuple(tensor.cpu() for tensor in found)


def check_op(subject: OpSubject, case: OpCase) -> Failure | None:
    """Outputs are within the bound, inputs are not changed, and rows do not meddle."""
    op = subject.op
    given = op.inputs(case)
    arguments = _moved(given, subject.device)
    exact, plain = op.exact(*given), op.plain(*given)
    for tensor in plain:
        if tensor.is_floating_point():
            leave_poison(*tensor.shape, dtype=tensor.dtype, device=subject.device)
    found = _call(subject, arguments)
    if len(found) != len(exact):
        return Failure(what=f"{len(found)} outputs instead of {len(exact)}", case=case)
    for i, (out, right, narrow) in enumerate(zip(found, exact, plain, strict=True)):
        where = "" if len(found) == 1 else f"output {i}, "
        if out.shape != narrow.shape or out.dtype != narrow.dtype:
            got = f"{out.dtype} {list(out.shape)}"
            what = f"{where}{got} instead of {narrow.dtype} {list(narrow.shape)}"
            return Failure(what=what, case=case)
        allowed = _allowed(subject, case, i, out, right)
        axes = tuple(f"index {d}" if d else "row" for d in range(out.dim()))
        wrong = first_beyond(out, right.double(), allowed, axes)
        if wrong is not None:
            return Failure(what=where + wrong.words, case=case)
    for i, (value, before) in enumerate(zip(arguments, given, strict=True)):
        is_watched = i not in op.may_change and isinstance(value, Tensor)
        if is_watched and not same_bits(value.cpu(), before):
            return Failure(what=f"argument {i} was changed; it may only be read", case=case)
    return _judge_rows(subject, case) if op.rows_apart and case.rows > 1 else None


def _allowed(subject: OpSubject, case: OpCase, i: int, out: Tensor, exact: Tensor) -> float:
    if not out.is_floating_point() or not out.numel():
        return 0.0

    def plain_error(rounds: int) -> float:
        worst = 0.0
        for more in range(rounds):
            given = subject.op.inputs(evolve(case, seed=case.seed + 1000 * more))
            right, plain = subject.op.exact(*given)[i], subject.op.plain(*given)[i]
            worst = max(worst, (plain.double() - right.double()).abs().max().item())
        return worst

    error = (out.double() - exact.double()).abs().max().item()
    return bound(error, unit_of(out.dtype, exact), plain_error)


def _judge_rows(subject: OpSubject, case: OpCase) -> Failure | None:
    """Put NaN into one row of the first argument and look at the others."""
    arguments = _moved(subject.op.inputs(case), subject.device)
    bad = case.seed % case.rows
    arguments[0][bad] = float("nan")
    for out in _call(subject, arguments):
        reached = out.flatten(1).isnan().any(1)
        reached[bad] = False
        if bool(reached.any()):
            what = f"a NaN in row {bad} reaches row {int(reached.nonzero()[0])}"
            return Failure(what=what, case=case)
    return None


def _sampler_of(function: Callable[..., Any]) -> type[Sampler]:
    """Return a sampler that draws with `ops.sample`."""

    class OpSampler(Sampler):
        def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
            if batch.suppressed is not None:
                logits[batch.suppressed] = float("-inf")
            is_filtered = batch.any_top_k or batch.any_top_p or batch.any_min_p
            filters = (batch.top_k, batch.top_p, batch.min_p) if is_filtered else None
            counters = (batch.seed, batch.child_index, batch.position)
            given = logits if logits.stride(1) == 1 else logits.contiguous()
            tokens, status = function(given, batch.temperature, *counters, filters)
            return SampledTokens(token_ids=tokens[:, None], status=status)

    return OpSampler


def _check_kept(
    function: Callable[..., Tensor], device: str, *, min_p: bool, case: SamplerCase
) -> Failure | None:
    """A filter leaves the tokens that the contract says, and their logits as they are."""
    case = evolve(case, dtype="float32", layout="contiguous")
    logits, size = make_logits(case), case.vocab_size
    columns = {
        "top_k": torch.tensor([top_k_of(row, size) for row in case.rows]),
        "top_p": torch.tensor([row.top_p for row in case.rows]),
        "min_p": torch.tensor([row.min_p for row in case.rows]),
    }
    names = ["min_p"] if min_p else ["top_k", "top_p"]
    out = function(logits.clone().to(device), *(columns[name].to(device) for name in names)).cpu()
    for i, row in enumerate(case.rows):
        row = evolve(row, temperature=1.0)
        row = evolve(row, top_k=None, top_p=1.0) if min_p else evolve(row, min_p=0.0)
        left, found = out[i] > float("-inf"), allowed(logits[i], row)
        wrong = (left & ~found.perhaps) | (found.surely & ~left)
        wrong |= left & (out[i] != logits[i])
        if bool(wrong.any()):
            token = int(wrong.nonzero()[0])
            what = f"row {i}, token {token} is {'kept' if left[token] else 'dropped'} ({row})"
            return Failure(what=what, case=case)
    return None


@st.composite
def op_cases(draw: st.DrawFn, small: bool) -> OpCase:
    """Draw rows of a size."""
    return OpCase(
        rows=draw(st.sampled_from([1, 2, 5, 33, 0] if small else [1, 2, 5, 33, 0, 130, 300])),
        size=draw(st.sampled_from([n for n in SIZES if n <= SMALL or not small])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        strided=draw(st.booleans()),
        flag=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def functions_of(ops: ModuleType | Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return the public functions of a module, some from beside it, or those of a mapping."""
    if not isinstance(ops, ModuleType):
        return dict(ops)
    package = ops.__name__.rpartition(".")[0] or ops.__name__
    own = {
        name: found
        for name, found in vars(ops).items()
        if inspect.isfunction(found)
        and (found.__module__ == ops.__name__ or found.__module__.startswith(f"{package}."))
    }
    return {name: found for name, found in own.items() if not name.startswith("_")}


def _checks(
    ops: ModuleType | Mapping[str, Callable[..., Any]],
    profile: Profile,
    device: str,
    extra: Mapping[str, Op],
) -> list[search.Check]:
    functions, known = functions_of(ops), {**OPS, **extra}
    share = 1 / max(1, len(functions))
    return [_check(name, f, profile, device, known, share) for name, f in functions.items()]


def _check(
    name: str,
    function: Callable[..., Any],
    profile: Profile,
    device: str,
    known: Mapping[str, Op],
    share: float,
) -> search.Check:
    judge: Callable[[Any], Failure | None]
    cases: st.SearchStrategy[Any] = sampler_cases(rows(), VOCAB_SIZES)
    skipped = None
    if name in known:
        op = known[name]
        subject = OpSubject(name=name, function=function, op=op, device=device)
        judge, cases = partial(check_op, subject), op_cases(profile.small)
    elif name == "sample":
        sampler = SamplerSubject(sampler=_sampler_of(function), device=device)
        judge = partial(check_draws, sampler)
        cases = sampler_cases(rows(bad=True), VOCAB_SIZES)
    elif name in ("keep_top_k_top_p", "keep_min_p"):
        judge = _kept_judge(function, device, min_p=name == "keep_min_p")
        cases = st.one_of(filtered_cases(VOCAB_SIZES[:1]), sampler_cases(rows(), VOCAB_SIZES))
    else:
        judge, skipped = _never, "the kit has no formula for it; `extra` takes one"
    return search.Check(name=name, judge=judge, cases=cases, share=share, skipped=skipped)


def _kept_judge(
    function: Callable[..., Any], device: str, *, min_p: bool
) -> Callable[[SamplerCase], Failure | None]:
    return lambda case: _check_kept(function, device, min_p=min_p, case=case)


def _never(_case: Any) -> None:
    return None


def iter_ops(
    ops: ModuleType | Mapping[str, Callable[..., Any]],
    *,
    profile: str | Profile = "quick",
    device: str = "cpu",
    extra: Mapping[str, Op] | None = None,
    seed: int = 0,
) -> Iterator[CheckResult]:
    """Yield the result of each operation as it ends; `extra` adds formulas by name.

    Raises: ConfigError for an unknown profile.
    """
    chosen = profile_of(profile)
    yield from search.run_all(_checks(ops, chosen, device, extra or {}), chosen, seed)


def check_ops(
    ops: ModuleType | Mapping[str, Callable[..., Any]],
    *,
    profile: str | Profile = "quick",
    device: str = "cpu",
    extra: Mapping[str, Op] | None = None,
    seed: int = 0,
) -> Report:
    """Check operations and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile.
    """
    name = ops.__name__ if isinstance(ops, ModuleType) else "ops"
    chosen = profile_of(profile).name
    report = Report(kind="ops", name=name, profile=chosen, device=device, seed=seed, checks=[])
    results = iter_ops(ops, profile=profile, device=device, extra=extra, seed=seed)
    return search.report_of(results, report)


class OpsTests(search.KitTests):
    """Subclass this in a test file, give a module or functions by name, and pytest runs them.

    `extra` adds formulas of operations that the kit does not know.
    """

    ops: ClassVar[ModuleType | Mapping[str, Callable[..., Any]]]
    extra: ClassVar[Mapping[str, Op]] = {}

    def _checks(self) -> list[search.Check]:
        return _checks(self.ops, self.profile, self.device, self.extra)

    def test_every_operation_is_within_the_bound(self) -> None:
        """Of those that the kit has a formula for."""
        for check in self._checks():
            if check.skipped is None:
                self._check(check.name)
