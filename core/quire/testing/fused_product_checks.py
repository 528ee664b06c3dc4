"""What must hold of products that take a sum, a norm or a SiLU with them, where offered."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from attrs import evolve, frozen
from torch import Tensor

from quire.testing.bound import same_bits
from quire.testing.kit_report import Failure
from quire.testing.quantization_cases import (
    LayerCase,
    Loaded,
    QuantizationSubject,
    draw,
    make_layer,
)
from quire.testing.quantization_checks import judge_product


@frozen(kw_only=True)
class _Fused:
    """What goes into a sum, a norm and a product, and what came out; None: not offered."""

    loaded: Loaded
    addends: tuple[Tensor, Tensor]
    kept: Tensor
    norm: Tensor
    found: tuple[Tensor, Tensor] | None


def _fused(subject: QuantizationSubject, case: LayerCase) -> _Fused | None:
    loaded = make_layer(subject, subject.make(), case)
    if loaded is None:
        return None
    dtype, device = getattr(torch, case.dtype), subject.device
    x, y = (draw(case, case.rows, case.in_features, salt=20 + i) for i in range(2))
    addends = x.to(device, dtype), y.to(device, dtype)
    norm = draw(case, case.in_features, salt=22).to(device, dtype)
    copies = addends[0].clone(), addends[1].clone()
    method = loaded.method
    found = method.apply_after_norm(loaded.layer, copies, (norm, 1e-5), loaded.bias)
    return _Fused(loaded=loaded, addends=addends, kept=copies[1], norm=norm, found=found)


def offers_fused_norm(subject: QuantizationSubject, plain: LayerCase) -> bool:
    """Answer whether a layer takes sum, norm and product in one pass, for one row or for two."""
    done = [_fused(subject, evolve(plain, rows=rows)) for rows in (1, 2)]
    return any(one is not None and one.found is not None for one in done)


def check_fused_norm(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """Sum, norm and product in one pass equal the three steps, where they are offered."""
    done = _fused(subject, case) if case.rows else None
    if done is None or done.found is None:
        return None
    total, norm = done.addends[0] + done.addends[1], done.norm
    if not torch.equal(done.found[1], total):
        return Failure(what="apply_after_norm returns another sum than the addends'", case=case)
    if not same_bits(done.kept, done.addends[1]):
        return Failure(what="apply_after_norm changed the second addend", case=case)
    normed = functional.rms_norm(total, norm.shape, norm, 1e-5)
    exact = functional.rms_norm(total.double(), norm.shape, norm.double(), 1e-5)
    failure = judge_product(subject, case, done.loaded, normed, done.found[0], exact)
    return failure and evolve(failure, what=f"apply_after_norm: {failure.what}", guess=None)


def _after_silu_mul(
    subject: QuantizationSubject, case: LayerCase
) -> tuple[Loaded, Tensor, Tensor | None] | None:
    """Return a layer, the gate and up that go in, and what comes out, if that is offered."""
    loaded = make_layer(subject, subject.make(), case)
    if loaded is None:
        return None
    gate_up = draw(case, case.rows, 2 * case.in_features, salt=23)
    gate_up = gate_up.to(subject.device, getattr(torch, case.dtype))
    found = loaded.method.apply_after_silu_mul(loaded.layer, gate_up.clone(), loaded.bias)
    return loaded, gate_up, found


def offers_fused_gate(subject: QuantizationSubject, plain: LayerCase) -> bool:
    """Answer whether a layer takes SiLU, multiplication and product in one pass."""
    done = [_after_silu_mul(subject, evolve(plain, rows=rows)) for rows in (1, 2)]
    return any(one is not None and one[2] is not None for one in done)


def check_fused_gate(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """SiLU, multiplication and product in one pass equal the steps, where they are offered."""
    done = _after_silu_mul(subject, case) if case.rows else None
    if done is None or done[2] is None:
        return None
    gate, up = done[1].chunk(2, dim=1)
    exact = functional.silu(gate.double()) * up.double()
    failure = judge_product(subject, case, done[0], functional.silu(gate) * up, done[2], exact)
    return failure and evolve(failure, what=f"apply_after_silu_mul: {failure.what}", guess=None)
