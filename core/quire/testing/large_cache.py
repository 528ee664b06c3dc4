"""A step in a cache of more than 2**31 numbers: offsets of 32 bits do not reach its last blocks.

On a CPU memory that nobody touches costs addresses only; a GPU has to have it. A backend that
copies the whole cache would take all memory of a machine: that much is not allowed meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quire.interfaces.attention import AttentionBackend
from quire.testing.attention_cases import (
    Case,
    Inputs,
    first_visible,
    make_batch,
    make_inputs,
    make_layer,
    make_tables,
    step_spans,
    step_tensors,
)
from quire.testing.attention_run import Subject, poison_of
from quire.testing.attention_strategies import Choices
from quire.testing.attention_surroundings import poisoned_outputs
from quire.testing.dense import attention, judge
from quire.testing.diagnosis import first_wrong
from quire.testing.kit_report import Failure

REACH = 2**31
SPARE_BYTES = 2**31
# Each has some gigabytes of addresses.
MOST_CASES = 12


def _memory(backend: type[AttentionBackend], case: Case) -> tuple[Tensor, int]:
    """Return a cache, and the first of its blocks that lies beyond 2**31 numbers.

    As much memory lies before it: where an offset of 32 bits is negative, it ends there.
    """
    layout, (_, num_blocks) = backend.kv_layout(case.spec), make_tables(case)
    a_block = math.prod(layout.block_shape)
    first = REACH // a_block + 1
    dtype = getattr(torch, layout.dtype)
    memory = torch.empty(
        REACH + (first + num_blocks) * a_block, dtype=dtype, device=case.spec.device
    )
    if memory.is_cuda:
        memory.fill_(poison_of(case, dtype))
    return memory[REACH:].view(first + num_blocks, *layout.block_shape), first


def why_no_large_cache(choices: Choices, subject: Subject, *, is_small: bool) -> str | None:
    """Return why no cache of that size can be had, or a step computed in it."""
    if is_small and choices.plain.device != "cpu":
        return "a GPU's memory is taken in the profile full only"
    case = Case(spec=choices.plain, lengths=((1, 1),))
    try:
        _memory(subject.backend, case)
    except (RuntimeError, MemoryError):
        return f"there is no memory here for a cache of {REACH} numbers"
    except (Exception, SystemExit):  # noqa: BLE001 - another check tells what it raises
        return None
    try:
        _judged(subject, case)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the check itself will tell
        if _is_about_memory(error):
            return f"it takes more memory than there is: is the whole cache copied? {error}"
    return None


def _is_about_memory(error: BaseException) -> bool:
    own = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    return own or "can't allocate memory" in str(error)


@contextlib.contextmanager
def _bounded(cache: Tensor) -> Iterator[None]:
    """Let this process take no more than some memory more, where the cache is the host's."""
    if cache.is_cuda:
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + SPARE_BYTES
    most = most if soft == resource.RLIM_INFINITY else min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_large_cache(subject: Subject, case: Case) -> Failure | None:
    """A step whose blocks are the last ones of a large cache gives what it should.

    Where it takes more memory than is allowed, there is nothing to judge.
    """
    try:
        return _judged(subject, case)
    except (Exception, SystemExit) as error:
        if _is_about_memory(error):
            return None
        raise


def _judged(subject: Subject, case: Case) -> Failure | None:
    inputs = make_inputs(case)
    cache, first = _memory(subject.backend, case)
    with _bounded(cache):
        found = _attended(subject, case, inputs, cache, first)
    exact = attention(case, inputs, torch.float64)
    verdict = judge(case, inputs, found, exact)
    if verdict.is_right:
        return None
    where = first_wrong(case, verdict, torch.cat(found), torch.cat(exact))
    what = f"in blocks from {first} on, beyond {REACH} numbers of the cache: {where}"
    return Failure(what=what, case=case, guess="an offset into the cache is of 32 bits")


def _attended(
    subject: Subject, case: Case, inputs: Inputs, cache: Tensor, first: int
) -> list[Tensor]:
    """Write the past and the step into the last blocks; return the outputs by sequence."""
    backend, layer = subject.make(case), make_layer(case, inputs)
    tables = [[first + block for block in table] for table in make_tables(case)[0]]
    size, device = case.spec.block_size, case.spec.device
    for i, (query_len, seq_len) in enumerate(case.lengths):
        span = (first_visible(case, query_len, seq_len), seq_len - query_len)
        if span[0] < span[1]:
            past = make_batch([span], [tables[i]], size, device=device)
            k, v = (x[i][slice(*span)].to(device) for x in (inputs.k, inputs.v))
            plan = backend.plan(past, 0)
            backend.prepare(plan)
            backend.write(layer, k, v, cache, plan)
    batch = make_batch(step_spans(case), tables, size, device=device)
    q, k, v = step_tensors(case, inputs)
    out = poisoned_outputs(case, q, wants_lse=False).out
    plan = backend.plan(batch, 0)
    backend.prepare(plan)
    backend.write(layer, k, v, cache, plan)
    backend.attend(layer, q, k, v, cache, plan, out)
    return list(out.cpu().split(batch.query_lens))
