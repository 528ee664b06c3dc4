"""What must hold of an attention backend: one function a check, which judges one case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import attrs
import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import (
    AttentionBackend,
    GraphSupport,
    latent_layout,
    why_refused,
)
from quire.testing.attention_cases import (
    Case,
    Inputs,
    limits_of,
    make_inputs,
)
from quire.testing.attention_run import Run, Subject, run
from quire.testing.attention_strategies import Choices
from quire.testing.bound import bits
from quire.testing.dense import attention, judge, judge_log_sums, log_sums
from quire.testing.diagnosis import STALE, first_wrong, guess_log_sum, guess_output
from quire.testing.graph_steps import GraphStep, graph_steps_of
from quire.testing.kit_report import Failure
from quire.testing.mixed_graph_steps import MixedGraphStep
from quire.testing.more_checks import check_encoder, check_fused_write, check_plans_apart
from quire.testing.slot_checks import check_next_slots, check_slots

# A long case that took so many seconds is not judged by further checks.
MOST_S = 0.5


def _never(_choices: Choices) -> str | None:
    return None


@frozen(kw_only=True)
class Check:
    """One line of a report.

    `judge` returns None for a case that is right. `why_skipped` says why a backend is not asked.
    `share` is the part of the time that it may take, `single`: its cases have one token a sequence.
    `guess` looks at the cases that failed, the smallest first, where `judge` cannot guess alone.
    """

    name: str
    judge: Callable[[Subject, Case], Failure | None]
    share: float
    single: bool = False
    guess: Callable[[Subject, Sequence[Case]], str | None] | None = None
    why_skipped: Callable[[Choices], str | None] = _never


def check_output(subject: Subject, case: Case) -> Failure | None:
    """Outputs are within the bound, and no hidden memory is read."""
    inputs = make_inputs(case)
    done = run(subject.backend, case, inputs, options=subject.options)
    exact = attention(case, inputs, torch.float64)
    verdict = judge(case, inputs, done.out, exact)
    if not verdict.is_right:
        what = first_wrong(case, verdict, torch.cat(done.out), torch.cat(exact))
        return Failure(what=what, case=case)
    if done.changed is not None:
        return Failure(what=f"{done.changed} was changed; a backend may only read it", case=case)
    if done.overrun is not None:
        guess = "the rest of a tile is stored, or an address is computed wrongly"
        what = f"memory beyond the ends of {done.overrun} was written"
        return Failure(what=what, case=case, guess=guess)
    return None


def check_blocks(subject: Subject, case: Case) -> Failure | None:
    """No block is changed that has no slot of the step, but for block 0."""
    if case.spec.latent is not None:
        kept, wanted = subject.backend.kv_layout(case.spec), latent_layout(case.spec)
        if kept != wanted:
            return Failure(
                what=f"latents are kept as {kept}; all backends keep {wanted}", case=case
            )
    held = subject.backend.workspace_bytes(case.spec, limits_of(case))
    if not isinstance(held, int) or held < 0:
        return Failure(what=f"workspace_bytes returns {held!r}; it is a number of bytes", case=case)
    inputs = make_inputs(case)
    done = run(subject.backend, case, inputs, options=subject.options)
    others = _changed_blocks(case, done)
    if not others:
        before, after = bits(done.before).flatten(1), bits(done.after).flatten(1)
        return check_next_slots(subject, case, before != after)
    fresh = run(subject.backend, case, inputs, options=subject.options, fresh=True)
    is_stale = not _changed_blocks(case, fresh)
    own = sorted(set((done.slots // case.spec.block_size).tolist()))
    return Failure(
        what=f"block {others[0]} was changed; the step's slots are in blocks {own}",
        case=case,
        guess=STALE if is_stale else "a token is written to a wrong slot",
    )


def _changed_blocks(case: Case, done: Run) -> list[int]:
    """Return the blocks without a slot of the step that were changed."""
    own = set((done.slots // case.spec.block_size).tolist()) | {0}
    before, after = bits(done.before).flatten(1), bits(done.after).flatten(1)
    changed = (before != after).any(1).nonzero().flatten().tolist()
    return [block for block in changed if block not in own]


def check_log_sum(subject: Subject, case: Case) -> Failure | None:
    """`lse` holds the natural log-sum-exp of each row's scores, sinks included."""
    inputs = make_inputs(case)
    done = run(subject.backend, case, inputs, wants_lse=True, options=subject.options)
    assert done.lse is not None
    verdict = judge_log_sums(case, inputs, done.lse)
    if verdict.is_right:
        return None
    exact = torch.cat(log_sums(case, inputs, torch.float64))
    what = f"lse: {first_wrong(case, verdict, done.lse, exact)}"
    return Failure(what=what, case=case, guess=guess_log_sum(case, inputs, done.lse))


def offers_log_sum(choices: Choices) -> str | None:
    """Answer whether the backend fills `lse`; it may refuse by NotImplementedError."""
    case = Case(spec=choices.plain, lengths=((1, 1),))
    options = choices.options
    try:
        run(choices.backend, case, make_inputs(case), wants_lse=True, options=options)
    except NotImplementedError as error:
        return f"not offered: {error}"
    except (Exception, SystemExit):  # noqa: BLE001 - the check itself will tell
        return None
    return None


def check_rows_apart(subject: Subject, case: Case) -> Failure | None:
    """A NaN in one sequence reaches no other one, and stays to be seen in its own."""
    case = attrs.evolve(case, shared_blocks=0)
    inputs = make_inputs(case)
    clean = run(subject.backend, case, inputs, options=subject.options).out
    victim = case.seed % len(case.lengths)
    inputs.k[victim][:] = float("nan")
    inputs.v[victim][:] = float("nan")
    found = run(subject.backend, case, inputs, options=subject.options).out
    for i, out in enumerate(found):
        if i != victim and not torch.equal(bits(out), bits(clean[i])):
            what = f"sequence {i} changes where keys and values of sequence {victim} are NaN"
            return Failure(what=what, case=case, guess="sequences are summed or masked together")
    if bool(found[victim].isnan().all()):
        return None
    what = f"sequence {victim}, whose keys and values are NaN, gives numbers"
    is_clipped = case.spec.has_quantized_kv
    guess = "a NaN is clipped where the cache is written" if is_clipped else "NaN is taken for zero"
    return Failure(what=what, case=case, guess=guess)


def check_batch_invariance(subject: Subject, case: Case) -> Failure | None:
    """A token gives the same bits alone and in a batch, whatever of its sequence is beside it."""
    if subject.backend.batch_invariant:
        case = attrs.evolve(case, spec=attrs.evolve(case.spec, batch_invariant=True))
        if why_refused(subject.backend, case.spec) is not None:
            return None
    inputs = make_inputs(case)
    together = run(subject.backend, case, inputs, options=subject.options).out
    for i, (query_len, seq_len) in enumerate(case.lengths):
        cuts = {query_len}
        if subject.backend.batch_invariant and case.spec.causal:
            cuts |= {1, -(-query_len // 2)}
        for cut in sorted(cuts, reverse=True):
            own = attrs.evolve(
                inputs, q=[inputs.q[i][query_len - cut :]], k=[inputs.k[i]], v=[inputs.v[i]]
            )
            alone = attrs.evolve(case, lengths=((cut, seq_len),), shared_blocks=0)
            out = run(subject.backend, alone, own, options=subject.options).out[0]
            if not torch.equal(out, together[i][query_len - cut :]):
                return _other_bits(case, i, cut, query_len)
    return None


def _other_bits(case: Case, sequence: int, cut: int, query_len: int) -> Failure:
    declared = "batch_invariant = True is declared, and the order of sums depends on"
    if cut == query_len:
        what = f"sequence {sequence} gives other bits alone than in the batch"
        return Failure(what=what, case=case, guess=f"{declared} the batch")
    what = (
        f"the last {cut} of {query_len} tokens of sequence {sequence} give other bits by themselves"
    )
    return Failure(what=what, case=case, guess=f"{declared} how a sequence is cut into steps")


def is_not_invariant(choices: Choices) -> str | None:
    """Return why bits need not be the same, and how often they are."""
    if choices.backend.batch_invariant:
        return why_refused(choices.backend, attrs.evolve(choices.plain, batch_invariant=True))
    subject = Subject(backend=choices.backend, options=choices.options)
    lengths = ((1, 30), (1, 7), (5, 12), (9, 9))
    tried = [Case(spec=choices.plain, lengths=lengths, seed=seed) for seed in range(4)]
    try:
        same = sum(check_batch_invariance(subject, case) is None for case in tried)
    except (Exception, SystemExit):  # noqa: BLE001 - another check tells what it raises
        return "batch_invariant is not declared"
    return f"batch_invariant is not declared; {same} of {len(tried)} batches came out bit-equal"


def check_graph(subject: Subject, case: Case) -> Failure | None:
    """A captured step serves other lengths than it was captured with; padding rows are zero."""
    inputs = make_inputs(case)
    graph = GraphStep(subject, case, inputs)
    for lengths in graph_steps_of(case):
        cut = graph.load(lengths)
        failure = _judge_rows(cut, graph.inputs_of(cut), graph.replay().cpu())
        if failure is not None:
            return failure
    return None


def _judge_rows(case: Case, inputs: Inputs, out: Tensor) -> Failure | None:
    num_seqs = len(case.lengths)
    exact = attention(case, inputs, torch.float64)
    rows = list(out[:num_seqs].split(1))
    verdict = judge(case, inputs, rows, exact)
    if not verdict.is_right:
        where = first_wrong(case, verdict, out[:num_seqs], torch.cat(exact))
        guess = "the plan of the capture is stale: it keeps lengths that it saw on the host"
        return Failure(what=f"replayed: {where}", case=case, guess=guess)
    padding = out[num_seqs:]
    if bool((padding == 0).all()):
        return None
    row, head, *_ = (padding != 0).nonzero()[0].tolist()
    got = padding[row, head].abs().max().item()
    what = f"padding row {row}, head {head}: got {got:g}, expected zeros"
    return Failure(what=what, case=case, guess="a row of length 0 is 0/0, or left unwritten")


def check_mixed_graph(subject: Subject, case: Case) -> Failure | None:
    """A captured step of any batch serves others; what belongs to no sequence stays as it was."""
    graph = MixedGraphStep(subject, case, make_inputs(case))
    everyone = list(range(len(case.lengths)))
    for chosen in (everyone, everyone[::2], everyone[1::2]):
        if chosen:
            part, inputs = graph.load(chosen)
            failure = _judge_mixed(part, inputs, graph.replay().cpu())
            if failure is not None:
                return failure
    return None


def _judge_mixed(case: Case, inputs: Inputs, out: Tensor) -> Failure | None:
    lens = [query_len for query_len, _ in case.lengths]
    exact = attention(case, inputs, torch.float64)
    own, others = out[: sum(lens)], out[sum(lens) :]
    verdict = judge(case, inputs, list(own.split(lens)), exact)
    if not verdict.is_right:
        where = first_wrong(case, verdict, own, torch.cat(exact))
        guess = "the plan of the capture is stale: it keeps what it saw of a batch on the host"
        return Failure(what=f"replayed: {where}", case=case, guess=guess)
    if bool(others.isnan().all()):
        return None
    token = int((~others.isnan()).flatten(1).any(1).nonzero()[0])
    what = f"the output of padding token {token} was written"
    return Failure(what=what, case=case, guess="the number of tiles is that of another batch")


def is_without_mixed_graphs(choices: Choices) -> str | None:
    """Return why no step with several tokens of a sequence is replayed."""
    support = choices.backend.graph_support
    return None if support is GraphSupport.ANY else f"graph_support is {support}"


def is_without_graphs(choices: Choices) -> str | None:
    """Return why no step is replayed."""
    supports = choices.backend.graph_support is not GraphSupport.NONE
    return None if supports else "graph_support is none"


def is_without_fused_write(choices: Choices) -> str | None:
    """Return why the fused form is not compared."""
    own, plain = choices.backend, AttentionBackend
    offered = own.rotate_and_write is not plain.rotate_and_write
    offered |= own.rotate_and_write_latents is not plain.rotate_and_write_latents
    return None if offered else "not offered"


def is_without_encoders(choices: Choices) -> str | None:
    """Return why bidirectional attention is not looked at."""
    spec = attrs.evolve(choices.plain, causal=False)
    return choices.backend.why_unsupported(spec)


def check_long(subject: Subject, names: Sequence[str], case: Case) -> Failure | None:
    """Judge a case of many keys by the checks of these names, one token a sequence in a graph.

    Where the first of them takes long, in an interpreter of kernels, it is the only one.
    """
    started = time.perf_counter()
    for check in CHECKS:
        if check.name in names and time.perf_counter() - started < MOST_S:
            singles = tuple((1, seq_len) for _, seq_len in case.lengths)
            own = attrs.evolve(case, lengths=singles) if check.single else case
            failure = check.judge(subject, own)
            if failure is not None:
                return attrs.evolve(failure, what=f"{check.name}: {failure.what}")
    return None


def checks_of_long(choices: Choices) -> list[str]:
    """Return the names of the checks that long cases are judged by."""
    wanted = ("output", "log-sum-exp", "batch invariance", "graph replay")
    served = [check for check in CHECKS if check.name in wanted]
    return [check.name for check in served if check.why_skipped(choices) is None]


CHECKS = [
    Check(name="output", judge=check_output, share=0.35, guess=guess_output),
    Check(name="blocks", judge=check_blocks, share=0.1),
    Check(name="slots", judge=check_slots, share=0.05),
    Check(name="plans apart", judge=check_plans_apart, share=0.1),
    Check(name="rows apart", judge=check_rows_apart, share=0.05),
    Check(name="log-sum-exp", judge=check_log_sum, share=0.1, why_skipped=offers_log_sum),
    Check(
        name="batch invariance",
        judge=check_batch_invariance,
        share=0.1,
        why_skipped=is_not_invariant,
    ),
    Check(
        name="graph replay",
        judge=check_graph,
        share=0.1,
        single=True,
        why_skipped=is_without_graphs,
    ),
    Check(
        name="graph of any step",
        judge=check_mixed_graph,
        share=0.05,
        why_skipped=is_without_mixed_graphs,
    ),
    Check(
        name="rotate_and_write",
        judge=check_fused_write,
        share=0.05,
        why_skipped=is_without_fused_write,
    ),
    Check(name="encoder", judge=check_encoder, share=0.05, why_skipped=is_without_encoders),
]
