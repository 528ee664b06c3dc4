"""Operations that models and plugins call: what each gives in float64, and in plain PyTorch.

An operation that the kit knows has a name, inputs for a case, a formula and its plain form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor

from quire.testing import smooth_formulas as smooth
from quire.testing.sampler_cases import Row
from quire.testing.sampler_formula import philox, uniforms

EPS = 1e-5
HEADS, KV_HEADS, BLOCK = 4, 2, 4


@frozen(kw_only=True)
class OpCase:
    """Rows of a size. `strided`: rows lie apart in memory. `flag`: with a bias, or with a norm."""

    rows: int
    size: int
    dtype: str = "float32"
    strided: bool = False
    flag: bool = False
    seed: int = 0

    def __str__(self) -> str:
        layout = "rows apart" if self.strided else "contiguous"
        flag = "; with bias or norm" if self.flag else ""
        return f"{self.rows} rows of {self.size}; {self.dtype}; {layout}{flag}; seed {self.seed}"


Arguments = tuple[Any, ...]


@frozen(kw_only=True)
class Op:
    """An operation: inputs on the CPU, the formula and the plain form, each giving its outputs.

    `may_change` are the arguments whose memory may be used.
    """

    inputs: Callable[[OpCase], Arguments]
    exact: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    may_change: tuple[int, ...] = ()
    # What counts as an output: what is returned, or also what was written.
    outputs: Callable[[Any, Arguments], tuple[Tensor, ...]] | None = None
    rows_apart: bool = True


def drawn(
    case: OpCase, *shape: int, salt: int = 0, apart: bool = False, scale: float = 1.0
) -> Tensor:
    """Return normal numbers in the case's dtype, times a scale."""
    generator = torch.Generator().manual_seed(100 * case.seed + salt)
    wide = (*shape[:-1], shape[-1] + 3) if apart and case.strided else shape
    values = scale * torch.randn(*wide, generator=generator)
    values = values.to(getattr(torch, case.dtype))
    return values[..., : shape[-1]]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def _exact_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return (_norm(x.double(), weight.double()),)


def _plain_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    normed = _norm(x.float(), torch.ones_like(weight, dtype=torch.float32))
    return (normed.to(x.dtype) * weight,)


def _exact_add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    # The norm is that of the sum as it is rounded.
    return (*_exact_norm(x + y, weight, eps), x.double() + y.double())


def _plain_add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return (*_plain_norm(x + y, weight, eps), x + y)


def _exact_silu(gate_up: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.double().chunk(2, -1)
    return (gate * gate.sigmoid() * up,)


def _plain_silu(gate_up: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.chunk(2, -1)
    return (functional.silu(gate) * up,)


def _exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double(),)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    return (functional.linear(x, weight, bias),)


def _exact_linear_silu(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _exact_silu(*_exact_linear(x, weight))


def _plain_linear_silu(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _plain_silu(*_plain_linear(x, weight))


def _exact_norm_linear(
    x: Tensor, y: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    normed, total = _exact_add_norm(x, y, norm, eps)
    return (*_exact_linear(normed, weight, bias), total)


def _plain_norm_linear(
    x: Tensor, y: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    normed, total = _plain_add_norm(x, y, norm, eps)
    return (*_plain_linear(normed, weight, bias), total)


def _exact_norm_linear_silu(
    x: Tensor, y: Tensor, norm: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, ...]:
    gate_up, total = _exact_norm_linear(x, y, norm, eps, weight)
    return (*_exact_silu(gate_up), total)


def _plain_norm_linear_silu(
    x: Tensor, y: Tensor, norm: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, ...]:
    gate_up, total = _plain_norm_linear(x, y, norm, eps, weight)
    return (*_plain_silu(gate_up), total)


def _norm_inputs(case: OpCase) -> Arguments:
    # The squares of some do not fit float16.
    scale = 300.0 if case.seed % 3 == 2 else 1.0
    x = drawn(case, case.rows, case.size, apart=True, scale=scale)
    return x, drawn(case, case.size, salt=1), EPS


def _add_norm_inputs(case: OpCase) -> Arguments:
    x, weight, eps = _norm_inputs(case)
    return x, drawn(case, case.rows, case.size, salt=2, apart=True), weight, eps


def _weight(case: OpCase, outputs: int) -> Tensor:
    return drawn(case, outputs, case.size, salt=3) / case.size**0.5


def _linear_inputs(case: OpCase) -> Arguments:
    x = drawn(case, case.rows, case.size, apart=True)
    return x, _weight(case, 24), drawn(case, 24, salt=4) if case.flag else None


def _gated_inputs(case: OpCase) -> Arguments:
    return drawn(case, case.rows, case.size, apart=True), _weight(case, 24)


def _norm_linear_inputs(case: OpCase) -> Arguments:
    _, weight, bias = _linear_inputs(case)
    return (*_add_norm_inputs(case), weight, bias)


def _norm_gated_inputs(case: OpCase) -> Arguments:
    return (*_add_norm_inputs(case), _weight(case, 24))


def _gather_inputs(case: OpCase) -> Arguments:
    generator = torch.Generator().manual_seed(case.seed)
    rows = torch.randint(0, case.rows, (case.rows + 2,), generator=generator) if case.rows else None
    empty = torch.zeros(0, dtype=torch.int64)
    chosen = empty if rows is None else rows
    return drawn(case, case.rows, case.size, apart=True), chosen.int()


def _gathered(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    return (x[rows.long()],)


def _noise_inputs(case: OpCase) -> Arguments:
    generator = torch.Generator().manual_seed(case.seed)
    words = torch.randint(-(2**62), 2**62, (case.rows,), generator=generator)
    small = torch.randint(0, 2**20, (2, case.rows), generator=generator)
    return words, small[0] % 128, small[1], case.size


def _uniforms(seed: Tensor, child: Tensor, position: Tensor, size: int) -> Tensor:
    columns = zip(seed.tolist(), child.tolist(), position.tolist(), strict=True)
    rows = [uniforms(Row(seed=s, child=c, position=p), size) for s, c, p in columns]
    return torch.cat(rows) if rows else torch.empty(0, size)


def _exact_noise(*arguments: Any) -> tuple[Tensor, ...]:
    return (-torch.log(-torch.log1p(-_uniforms(*arguments).double())),)


def _plain_noise(*arguments: Any) -> tuple[Tensor, ...]:
    return (-torch.log(-torch.log1p(-_uniforms(*arguments))),)


def _philox_inputs(case: OpCase) -> Arguments:
    generator = torch.Generator().manual_seed(case.seed)
    counter = torch.randint(0, 2**32, (4, max(1, case.rows)), generator=generator)
    seed = torch.randint(-(2**62), 2**62, (1,), generator=generator)
    return tuple(counter), seed


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    return tuple(philox(counter, seed.item()))  # type: ignore[arg-type]


def _rotate_inputs(case: OpCase) -> Arguments:
    head_dim = 2 * max(1, min(case.size, 64) // 2)
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(case.seed)
    qkv = drawn(case, case.rows, (HEADS + 2 * KV_HEADS) * head_dim, apart=True)
    num_slots = BLOCK * (case.rows // BLOCK + 3)
    slots = torch.randperm(num_slots, generator=generator)[: case.rows].int()
    positions = torch.randint(0, 50, (case.rows,), generator=generator).int()
    caches = [drawn(case, num_slots, KV_HEADS, head_dim, salt=n) for n in (5, 6)]
    caches = [cache.unflatten(0, (-1, BLOCK)) for cache in caches]
    angles = 6 * torch.rand(50, head_dim // 2 if case.seed % 2 else 1, generator=generator)
    norm = None
    if case.flag:
        norm = (drawn(case, head_dim, salt=7), drawn(case, head_dim, salt=8), EPS)
    rotary = None if case.seed % 5 == 4 else (angles.cos(), angles.sin())
    assert qkv.dtype == dtype
    return qkv, positions, slots, *caches, {"rotary": rotary, "norm": norm}


def _rotated(arguments: Arguments, wide: torch.dtype) -> tuple[Tensor, ...]:
    qkv, positions, slots, keys, values, options = arguments
    norm, rotary, head_dim = options["norm"], options["rotary"], keys.shape[-1]
    heads = qkv.to(wide).unflatten(1, (-1, head_dim))
    split = HEADS + KV_HEADS
    qk, v = heads[:, :split], heads[:, split:]
    if norm is not None:
        weights = torch.stack([norm[0]] * HEADS + [norm[1]] * KV_HEADS).to(wide)
        qk = _norm(qk, weights) if wide == torch.float64 else _plain_norm(qk, weights, EPS)[0]
    if rotary is not None:
        cos, sin = (table[positions.long()].to(qkv.dtype).to(wide)[:, None] for table in rotary)
        half = cos.shape[-1]
        a, b, rest = qk[..., :half], qk[..., half : 2 * half], qk[..., 2 * half :]
        qk = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
    at = slots.long() // BLOCK, slots.long() % BLOCK
    keys, values = keys.to(wide).clone(), values.to(wide).clone()
    keys[at], values[at] = qk[:, HEADS:], v
    return qk[:, :HEADS], keys, values


def _exact_rotate(*arguments: Any) -> tuple[Tensor, ...]:
    return _rotated(arguments, torch.float64)


def _plain_rotate(*arguments: Any) -> tuple[Tensor, ...]:
    return _rotated(arguments, arguments[0].dtype)


def _written(returned: Any, arguments: Arguments) -> tuple[Tensor, ...]:
    return returned, arguments[3], arguments[4]


def _op(inputs: Any, exact: Any, plain: Any, *may_change: int, **more: Any) -> Op:
    return Op(inputs=inputs, exact=exact, plain=plain, may_change=may_change, **more)


def _route_inputs(case: OpCase) -> Arguments:
    top_k = min(case.size, 3)
    return 3 * drawn(case, case.rows, case.size, apart=True), top_k, {"normalise": case.flag}


def _exact_route(logits: Tensor, top_k: int, options: Any) -> tuple[Tensor, ...]:
    return _routed(logits.double(), top_k, options["normalise"])


def _plain_route(logits: Tensor, top_k: int, options: Any) -> tuple[Tensor, ...]:
    return _routed(logits.float(), top_k, options["normalise"])


def _routed(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, ...]:
    weights = logits.softmax(-1).sort(dim=-1, descending=True).values[:, :top_k]
    return (weights / weights.sum(-1, keepdim=True) if normalise else weights,)


def _weights_alone(returned: Any, arguments: Arguments) -> tuple[Tensor, ...]:
    """Return the weights, found again at the ids: which of equal ones come first is open."""
    logits, options = arguments[0], arguments[-1]
    wide = logits.float().softmax(-1).take_along_dim(returned[1], -1)
    if options["normalise"]:
        wide = wide / wide.sum(-1, keepdim=True)
    return (torch.where((wide - returned[0]).abs() <= 1e-5, returned[0], torch.nan),)


EXPERTS, EXPERT_SIZE = 5, 12


def _experts_inputs(case: OpCase) -> Arguments:
    gate_up = drawn(case, EXPERTS, 2 * EXPERT_SIZE, case.size, salt=6, scale=case.size**-0.5)
    down = drawn(case, EXPERTS, case.size, EXPERT_SIZE, salt=7, scale=EXPERT_SIZE**-0.5)
    generator = torch.Generator().manual_seed(case.seed)
    scores = torch.rand(case.rows, EXPERTS, generator=generator)
    # With the flag, all tokens have the same experts.
    scores = scores[:1].expand_as(scores) if case.flag else scores
    weights, expert_ids = scores.softmax(-1).topk(1 + case.seed % 3, dim=-1)
    x = drawn(case, case.rows, case.size, apart=True)
    return x, gate_up, down, weights.contiguous(), expert_ids.contiguous()


def _exact_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> tuple[Tensor, ...]:
    return _plain_experts(x.double(), gate_up.double(), down.double(), weights.double(), ids)


def _plain_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> tuple[Tensor, ...]:
    gate, up = torch.einsum("ni,nkoi->nko", x, gate_up[ids]).chunk(2, -1)
    made = torch.einsum("nko,nkho->nkh", functional.silu(gate) * up, down[ids])
    return ((made * weights.unsqueeze(-1)).sum(1).to(x.dtype),)


def _gate_up_inputs(case: OpCase) -> Arguments:
    return (3 * drawn(case, case.rows, 2 * case.size, apart=True),)


def _wide(inputs: Callable[[OpCase], Arguments]) -> Callable[[OpCase], Arguments]:
    return lambda case: (*inputs(case), {"offset": 1.0 if case.flag else 0.0})


def _cap_inputs(case: OpCase) -> Arguments:
    return 6 * drawn(case, case.rows, case.size, apart=True), smooth.CAP


OPS: dict[str, Op] = {
    "rms_norm": _op(_norm_inputs, _exact_norm, _plain_norm),
    "add_rms_norm": _op(_add_norm_inputs, _exact_add_norm, _plain_add_norm, 0),
    "wide_rms_norm": _op(_wide(_norm_inputs), smooth.exact_wide_norm, smooth.plain_wide_norm),
    "add_wide_rms_norm": _op(
        _wide(_add_norm_inputs),
        smooth.of_sum(smooth.exact_wide_norm),
        smooth.of_sum(smooth.plain_wide_norm),
        0,
    ),
    "gelu_mul": _op(_gate_up_inputs, smooth.exact_gelu, smooth.plain_gelu),
    "soft_cap": _op(_cap_inputs, smooth.exact_cap, smooth.plain_cap, 0),
    "silu_mul": _op(_gate_up_inputs, _exact_silu, _plain_silu),
    "linear": _op(_linear_inputs, _exact_linear, _plain_linear),
    "linear_silu_mul": _op(_gated_inputs, _exact_linear_silu, _plain_linear_silu),
    "add_rms_norm_linear": _op(_norm_linear_inputs, _exact_norm_linear, _plain_norm_linear, 0),
    "add_rms_norm_linear_silu_mul": _op(
        _norm_gated_inputs, _exact_norm_linear_silu, _plain_norm_linear_silu, 0
    ),
    "route": _op(_route_inputs, _exact_route, _plain_route, outputs=_weights_alone),
    "experts": _op(_experts_inputs, _exact_experts, _plain_experts),
    "gather_rows": _op(_gather_inputs, _gathered, _gathered, rows_apart=False),
    "gumbel_noise": _op(_noise_inputs, _exact_noise, _plain_noise, rows_apart=False),
    "philox_4x32": _op(_philox_inputs, _philox, _philox, rows_apart=False),
    "rotate_and_write": _op(
        _rotate_inputs, _exact_rotate, _plain_rotate, 3, 4, outputs=_written, rows_apart=False
    ),
}
