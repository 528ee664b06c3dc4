"""Checks beside the plain step: layers of one plan, plans at once, fused writes, encoders."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from quire.layers.attention import QKNorm, normalise_and_rotate
from quire.layers.rotary import RotaryTable
from quire.testing.attention_cases import (
    LIMITS,
    Case,
    Layer,
    make_batch,
    make_inputs,
    make_layer,
    make_tables,
    step_tensors,
)
from quire.testing.attention_run import Subject, make_cache, write_past
from quire.testing.attention_surroundings import group_of, poisoned_outputs, step_of
from quire.testing.dense import attention, judge
from quire.testing.diagnosis import explain, first_wrong
from quire.testing.kit_report import Failure
from quire.testing.latent_checks import check_latent_write

# What a layer may have of norm and rotation, drawn by a case's seed.
FUSED_FORMS = ("whole", "no norm", "partial", "no rotation")


def check_plans_apart(subject: Subject, case: Case) -> Failure | None:
    """Two steps in flight and two layers a step do not touch one another.

    Both steps are planned before the first one runs; each layer has a cache and sinks of its own.
    Every other case has an instance a step, as groups of layers have.
    """
    other = attrs.evolve(case, lengths=tuple(_shorter(case.lengths)), seed=case.seed + 1)
    failure = _run_planned_at_once(subject, case, [case, other])
    if failure is None:
        return None
    if any(_run_planned_at_once(subject, case, [step]) for step in (case, other)):
        return failure  # the other step's plan is not the cause
    guess = "a plan or a layer is remembered by the backend (a stale plan)"
    if case.seed % 2:
        guess = "what one instance plans is another's too: it is kept by class or module"
    return attrs.evolve(failure, guess=guess)


def _run_planned_at_once(subject: Subject, case: Case, steps: list[Case]) -> Failure | None:
    """Plan all steps, then run them one after another, two layers each."""
    made = [subject.make(case), subject.make(case)]
    has_own = bool(case.seed % 2)
    backends = made if has_own else made[:1] * 2
    caches: list[Tensor] = []
    for backend, step in zip(backends, steps, strict=False):
        for layer in range(2):
            inputs = make_inputs(attrs.evolve(step, seed=step.seed + 2 * layer))
            cache = make_cache(subject.backend, step)
            write_past(backend, step, inputs, cache)
            caches.append(cache)
    batches = [step_of(step) for step in steps]
    for slot, batch in enumerate(batches):
        batch.in_flight_slot = 0 if has_own else slot % (LIMITS.max_steps_in_flight + 1)
    plans = [backends[n].plan(batch, group_of(batch)) for n, batch in enumerate(batches)]
    for n, step in enumerate(steps):
        backend = backends[n]
        backend.prepare(plans[n])
        for layer in range(2):
            inputs = make_inputs(attrs.evolve(step, seed=step.seed + 2 * layer))
            q, k, v = step_tensors(step, inputs)
            out = poisoned_outputs(step, q, wants_lse=False).out
            own = make_layer(step, inputs, index=2 * n + layer)
            backend.write(own, k, v, caches[2 * n + layer], plans[n])
            backend.attend(own, q, k, v, caches[2 * n + layer], plans[n], out)
            found = list(out.cpu().split([query_len for query_len, _ in step.lengths]))
            exact = attention(step, inputs, torch.float64)
            verdict = judge(step, inputs, found, exact)
            if not verdict.is_right:
                where = first_wrong(step, verdict, torch.cat(found), torch.cat(exact))
                what = f"step {n}, layer {layer}, of two steps planned at once: {where}"
                return Failure(what=what, case=step)
    return None


def _shorter(lengths: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Return other lengths of as many sequences."""
    found = [(max(1, query_len // 2), max(1, seq_len * 2 // 3)) for query_len, seq_len in lengths]
    found = [(min(query_len, seq_len), seq_len) for query_len, seq_len in found]
    return sorted(found, key=lambda pair: pair[0] > 1)


def check_fused_write(subject: Subject, case: Case) -> Failure | None:
    """The fused form equals norm, rotation and write, as near as plain PyTorch does."""
    spec = case.spec
    if spec.latent is not None:
        return check_latent_write(subject, case)
    if spec.value_head_dim != spec.head_dim:
        return None
    generator = torch.Generator().manual_seed(case.seed)
    dtype, batch = getattr(torch, spec.dtype), step_of(case)
    num_tokens, split = len(batch.positions), spec.num_heads + spec.num_kv_heads
    shape = (num_tokens, (split + spec.num_kv_heads) * spec.head_dim)
    qkv = torch.randn(*shape, generator=generator).to(spec.device, dtype)
    norm, rotary = _norm_and_rotary(case, generator)
    heads = qkv.clone().unflatten(1, (-1, spec.head_dim))
    plain = normalise_and_rotate(heads[:, :split].clone(), batch.positions, rotary, norm)
    exact = _exact(case, heads[:, :split], norm, rotary, batch.positions)
    backend = subject.make(case)
    caches = [make_cache(subject.backend, attrs.evolve(case, poison="zero")) for _ in range(2)]
    plan = backend.plan(batch, group_of(batch))
    backend.prepare(plan)
    rounded, layer = exact.to(dtype), make_layer(case, make_inputs(case))
    backend.write(layer, rounded[:, spec.num_heads :], heads[:, split:], caches[0], plan)
    q = backend.rotate_and_write(layer, qkv, batch.positions, rotary, norm, caches[1], plan)
    if q is None:
        return None
    unit = torch.finfo(dtype).eps
    allowed = unit * exact.abs().max().item() + 2 * (plain.double() - exact).abs().max().item()
    errors = {"q": ((q.double() - exact[:, : spec.num_heads]).abs().max().item(), allowed)}
    if spec.has_quantized_kv:
        errors["the cache"] = _error_of_quantized(caches[1], caches[0], allowed, layer)
    else:
        # The right keys were rounded on their way into the cache.
        errors["the cache"] = (_largest_difference(*caches) / 2, allowed)
    for name, (error, most) in errors.items():
        if not error <= most:
            what = f"rotate_and_write: {name} is off by {error:.3g}, bound {most:.3g}"
            return Failure(what=what, case=case)
    return None


def _largest_difference(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).abs().max().item()


def _error_of_quantized(
    found: Tensor, right: Tensor, allowed: float, layer: Layer
) -> tuple[float, float]:
    """Return how far stored numbers are off beyond one step of their dtype, and how far they may.

    A key that was rounded another way before may fall to the other side of the middle between two
    stored numbers.
    """
    assert layer.k_scale is not None, "the cache is quantized"
    numbers = torch.finfo(found.dtype)
    found, right = found.double(), right.double()
    step = numbers.eps * torch.maximum(found.abs(), right.abs()) + numbers.smallest_normal
    beyond = ((found - right).abs() - step).max().item()
    return beyond, 2 * allowed / layer.k_scale.min().item()


def _norm_and_rotary(
    case: Case, generator: torch.Generator
) -> tuple[QKNorm | None, RotaryTable | None]:
    """Return both, or one of them, or a table for the first part of a head."""
    form = FUSED_FORMS[case.seed % len(FUSED_FORMS)]
    spec, dtype = case.spec, getattr(torch, case.spec.dtype)
    weights = torch.randn(2, spec.head_dim, generator=generator).to(spec.device, dtype)
    longest = max(seq_len for _, seq_len in case.lengths)
    angles = 6 * torch.rand(longest, spec.head_dim // 2, generator=generator).to(spec.device)
    if form == "partial":
        angles = angles[:, : max(1, spec.head_dim // 4)]
    norm = QKNorm(weights[0], weights[1], 1e-6, (spec.num_heads, spec.num_kv_heads))
    rotary = RotaryTable(angles.cos(), angles.sin(), spec.head_dim, dtype)
    return None if form == "no norm" else norm, None if form == "no rotation" else rotary


def _exact(
    case: Case,
    heads: Tensor,
    norm: QKNorm | None,
    rotary: RotaryTable | None,
    positions: Tensor,
) -> Tensor:
    """Return normalised and rotated heads in float64; cosines are those of the model's dtype."""
    spec, x = case.spec, heads.double()
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        weights = [norm.q] * spec.num_heads + [norm.k] * spec.num_kv_heads
        x = x * torch.stack(weights).double()
    if rotary is None:
        return x
    cos = rotary.cos[positions.long()].to(heads.dtype).double()[:, None]
    sin = rotary.sin[positions.long()].to(heads.dtype).double()[:, None]
    turned, rest = x[..., : rotary.rotary_dim], x[..., rotary.rotary_dim :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def check_encoder(subject: Subject, case: Case) -> Failure | None:
    """Without causality all keys are seen; without a cache the step's own are all there are."""
    spec = attrs.evolve(case.spec, causal=False, sliding_window=None, kv_dtype=case.spec.dtype)
    if subject.backend.why_unsupported(spec) is not None:
        return None
    lengths = sorted({(n, n) for _, n in case.lengths}, key=lambda pair: pair[0] > 1)
    case = attrs.evolve(case, spec=spec, lengths=tuple(lengths), shared_blocks=0)
    inputs, backend = make_inputs(case), subject.make(case)
    tables, _ = make_tables(case)
    batch = make_batch([(0, n) for n, _ in lengths], tables, spec.block_size, device=spec.device)
    q, k, v = step_tensors(case, inputs)
    out = poisoned_outputs(case, q, wants_lse=False).out
    plan = backend.plan(batch, 0)
    backend.prepare(plan)
    backend.attend(make_layer(case, inputs), q, k, v, None, plan, out)
    found = list(out.cpu().split(batch.query_lens))
    exact = attention(case, inputs, torch.float64)
    verdict = judge(case, inputs, found, exact)
    if verdict.is_right:
        return None
    where = first_wrong(case, verdict, torch.cat(found), torch.cat(exact))
    guess = None if torch.cat(found).isnan().any() else explain(case, inputs, found)
    return Failure(what=f"without a cache: {where}", case=case, guess=guess)
