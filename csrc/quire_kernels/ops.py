"""Operations that models and backends call, part of the versioned interface.

Each has a PyTorch body, which is its meaning. On CUDA a kernel from a module beside this one takes
its place where Triton is installed, on a CPU one of `quire_kernels.cpu` where that is built.
Importing this module never imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from quire_kernels import mixtures, philox, smooth, wide_norms, with_cpu
from quire_kernels.mixtures import ExpertScales as ExpertScales
from quire_kernels.mixtures import GroupChoice as GroupChoice
from quire_kernels.with_triton import kernels as _kernels

philox_4x32 = philox.philox_4x32
experts = mixtures.experts
route = mixtures.route
route_in_groups = mixtures.route_in_groups
clamped_experts = mixtures.clamped_experts
expert_products = mixtures.expert_products
why_no_experts = mixtures.why_no_experts
silu_mul = smooth.silu_mul
gelu_mul = smooth.gelu_mul
soft_cap = smooth.soft_cap
wide_rms_norm = wide_norms.wide_rms_norm
add_wide_rms_norm = wide_norms.add_wide_rms_norm
# Tokens of a group, of which a draw takes one before a token.
_GROUP = 64
# Below -87.3 a float32's exponential is not normal.
_LEAST_EXPONENT = -80.0


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, batch_invariant: bool = False) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, computed in float32.

    `x` [..., size], `weight` [size] of the same dtype. `batch_invariant`, here and below: a row has
    the same bits however many there are.
    Source: Zhang and Sennrich, "Root mean square layer normalization", 2019.
    """
    if x.is_cuda and (kernels := _kernels("norms")) and x.shape[-1] <= kernels.MAX_SIZE:
        return kernels.rms_norm(x, weight, eps, is_fixed=batch_invariant)
    if not x.is_cpu:
        return functional.rms_norm(x, weight.shape, weight, eps)
    if (rows := with_cpu.kernels()) and rows.serves(x):
        return rows.rms_norm(x, weight, eps)
    # PyTorch squares into memory of its own: 2.9 ms for [2048, 256] in bfloat16 on two cores
    # against 0.5 ms for a norm that keeps nothing.
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(wide, scale, out=None if wide is x else wide)
    return normed.to(x.dtype).mul_(weight)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual); the sum may be made in x's memory.

    `x`, `residual` [num_tokens, size], `weight` [size].
    """
    if x.is_cuda and (kernels := _kernels("norms")) and x.shape[-1] <= kernels.MAX_SIZE:
        return kernels.add_rms_norm(x, residual, weight, eps, is_fixed=batch_invariant)
    if x.is_cpu and (rows := with_cpu.kernels()) and rows.serves(x) and rows.serves(residual):
        return rows.rms_norm(x, weight, eps, residual), x
    total = x.add_(residual)
    return rms_norm(total, weight, eps, batch_invariant=batch_invariant), total


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x` [num_rows, size] to 8 bits with a scale for each row, symmetric.

    Returns uint8 `values` [num_rows, size] from 1 to 255 and float32 `scales` [num_rows], the
    largest of a row by 127; (values - 128) * scales is near x. A row that has a NaN or an infinity
    has the scale NaN.
    """
    if x.is_cpu and (rows := with_cpu.kernels()) and rows.serves(x):
        rounded: tuple[Tensor, Tensor] = rows.quantize_rows(x)
        return rounded
    wide = x.float()
    largest = torch.linalg.vector_norm(wide, ord=torch.inf, dim=1)
    scales = largest / 127
    scales = torch.where(scales == 0, 1.0, scales)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    values = (wide / scales[:, None]).round_().clamp_(-127, 127).nan_to_num_(0.0).add_(128)
    return values.to(torch.uint8), scales


def _one_row_kernels(x: Tensor, weight: Tensor, *, gated: bool = False) -> Any:
    """Return the kernels of one-row products if they take this one, else None."""
    if not x.is_cuda or x.shape[0] != 1:
        return None
    kernels = _kernels("gemv")
    return kernels if kernels and kernels.serves(x, weight, gated=gated) else None


def _product_kernels(x: Tensor, weight: Tensor, *, gated: bool = False) -> Any:
    """Return the kernels that take this product faster than cuBLAS does, else None."""
    if not x.is_cuda or not 1 < x.shape[0] <= 128:
        return _one_row_kernels(x, weight, gated=gated)
    kernels = _kernels("few_rows")
    return kernels if kernels and kernels.serves(x, weight, gated=gated) else None


def fuses_norm(x: Tensor) -> bool:
    """Whether a norm before a product costs no launch of its own: for one token on a GPU."""
    return x.is_cuda and x.shape[0] == 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b of `x` [num_tokens, in_features], W [out_features, in_features]."""
    if kernels := _product_kernels(x, weight):
        out: Tensor = kernels.linear(x, weight, bias)
        return out
    return functional.linear(x, weight, bias)


def add_rms_norm_linear(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return linear(rms_norm(x + residual)) and x + residual; x may be changed.

    One launch where there is one row: every program norms it for itself.
    """
    if kernels := _one_row_kernels(x, weight):
        fused: tuple[Tensor, Tensor] = kernels.add_rms_norm_linear(
            x, residual, norm_weight, eps, weight, bias
        )
        return fused
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return linear(normed, weight, bias), total


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """Return silu_mul(linear(x, weight)), the rows of `weight` [2 * size, in_features] gate first.

    One launch where `x` has few rows.
    """
    if kernels := _product_kernels(x, weight, gated=True):
        out: Tensor = kernels.linear_silu_mul(x, weight)
        return out
    return silu_mul(linear(x, weight))


def add_rms_norm_linear_silu_mul(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return linear_silu_mul(rms_norm(x + residual)) and x + residual; x may be changed."""
    if kernels := _one_row_kernels(x, weight, gated=True):
        fused: tuple[Tensor, Tensor] = kernels.add_rms_norm_linear_silu_mul(
            x, residual, norm_weight, eps, weight
        )
        return fused
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return linear_silu_mul(normed, weight), total


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return the given rows, int32 [num_rows], of `x` [num_tokens, size]."""
    return x.index_select(0, rows)


def gumbel_noise(
    seed: Tensor,
    child: Tensor,
    position: Tensor,
    size: int,
    *,
    first: Tensor | None = None,
    stage: int = 0,
) -> Tensor:
    """Return the Gumbel noise of `size` tokens, or groups with `stage` 1: [num_rows, size].

    Float32. `seed`, `child`, `position` int64 [num_rows]; `first` int64 [num_rows], multiples of
    four, says where each row begins, by default at 0. A pure function of these and the place, which
    `quire.interfaces.sampling.Sampler` defines.
    """
    quads = torch.arange((size + 3) // 4, device=seed.device)[None, :]
    if first is not None:
        quads = quads + first[:, None] // 4
    last = torch.full_like(position, stage)[:, None]
    counter = (quads, position[:, None], child[:, None], last)
    lanes = torch.stack(philox_4x32(counter, seed[:, None]), dim=-1)
    uniform = (lanes.flatten(1)[:, :size].float() + 0.5) * 2.0**-32
    # Rounded to float32 the largest are 1, whose noise is -inf: then a token that a filter
    # dropped could be drawn.
    uniform.clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def draw(scores: Tensor, seed: Tensor, child: Tensor, position: Tensor) -> Tensor:
    """Return a token a row, int64 [num_rows], drawn with the probabilities softmax(scores).

    `scores` float32 [num_rows, vocab_size], -inf where a token is left out; `seed`, `child` and
    `position` int64 [num_rows]. A row that is not finite gets some token.
    Source: `quire.interfaces.sampling.Sampler` defines the draw.
    """
    padded = functional.pad(scores, (0, -scores.shape[1] % _GROUP), value=float("-inf"))
    groups = padded.unflatten(1, (-1, _GROUP))
    noise = gumbel_noise(seed, child, position, groups.shape[1], stage=1)
    group = (_log_mass(groups) + noise).argmax(dim=-1, keepdim=True)
    inside = groups.take_along_dim(group.unsqueeze(-1), dim=1).squeeze(1)
    first = group[:, 0] * _GROUP
    noise = gumbel_noise(seed, child, position, _GROUP, first=first)
    return first + (inside + noise).argmax(dim=-1)


def _log_mass(groups: Tensor) -> Tensor:
    """Return the logsumexp over the last dimension, of only -inf the least finite number.

    Exponents below a float32's normal range take a CPU 30 times as long (-inf four times), and
    what they add to a sum that holds exp(0) is lost: it has the same bits without them.
    """
    top = groups.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(groups.dtype).min)
    shares = (groups - top).clamp_min_(_LEAST_EXPONENT).exp_()
    return shares.sum(dim=-1).log_().add_(top.squeeze(-1))


def rotate_and_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Norm and rotate q and k heads, write keys and values to their slots, and return q.

    `qkv` [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], q, k and v heads in order;
    `positions` and `slots` (block * block_size + offset) integers [num_tokens]. The caches are
    [num_blocks, block_size, num_kv_heads, head_dim] and may be strided; q comes back as
    [num_tokens, num_heads, head_dim].
    `norm` is the weights of q and k [head_dim] and the epsilon of an RMSNorm of each head.
    `rotary` is the cosines and sines of a `quire.layers.rotary.RotaryTable`, float32
    [max_len, rotary_dim / 2], which are rounded to the dtype of `qkv` first. `scales` are as those
    of `write_kv`.
    """
    if qkv.is_cuda and (kernels := _kernels("rotary")):
        caches = (key_cache, value_cache)
        q: Tensor = kernels.rotate_and_write(
            qkv, positions, slots, *caches, rotary=rotary, norm=norm, scales=scales
        )
        return q
    num_kv_heads, head_dim = key_cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norm is not None:
        q, k = rms_norm(q, norm[0], norm[2]), rms_norm(k, norm[1], norm[2])
    if rotary is not None:
        cos, sin = (table[positions.long(), None].to(qkv.dtype) for table in rotary)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    write_kv(k, v, slots, key_cache, value_cache, scales=scales)
    return q


def write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write keys and values to their slots.

    `k` [num_tokens, num_kv_heads, head_dim], `v` [num_tokens, num_kv_heads, value_head_dim]; slots
    and caches as in `rotate_and_write`. `scales` of keys and of values, float32 [num_kv_heads], for
    caches of 8-bit floats: x is stored as the number nearest to x / scale, clipped to what the
    dtype has; a NaN stays a NaN.
    """
    if k.is_cuda and (kernels := _kernels("rotary")):
        kernels.write_kv(k, v, slots, key_cache, value_cache, scales=scales)
        return
    if scales is not None:
        largest = torch.finfo(key_cache.dtype).max
        k, v = (
            (x.float() / scale[:, None]).clamp_(-largest, largest)
            for x, scale in zip((k, v), scales, strict=True)
        )
    places, block_size = slots.long(), key_cache.shape[1]
    at = places // block_size, places % block_size
    for x, cache in ((k, key_cache), (v, value_cache)):
        stored = x.to(cache.dtype)
        if stored.element_size() == 1:
            # Not all devices index floats of 8 bits.
            stored, cache = stored.view(torch.uint8), cache.view(torch.uint8)
        cache.index_put_(at, stored)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of `heads`; `cos`, `sin` [num_tokens, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    first, second, rest = heads.split((half, half, heads.shape[-1] - 2 * half), dim=-1)
    turned = torch.addcmul(first * cos, second, -sin), torch.addcmul(second * cos, first, sin)
    return torch.cat((*turned, rest), dim=-1)


def keep_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the k most likely tokens, then the fewest whose probability reaches top_p; -inf else.

    `logits` float32 [num_rows, vocab_size]; `top_k` int64 and `top_p` float32 [num_rows]. Ties are
    ordered by token id, so that exactly k remain.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= top_k.unsqueeze(1), float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = before >= top_p.unsqueeze(1)
    # top_p of 1 keeps everything, also what rounding in the sum would cut off.
    outside &= (top_p < 1).unsqueeze(1)
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Make tokens -inf that are less likely than min_p, [num_rows], times the most likely one."""
    best = logits.max(dim=-1, keepdim=True).values
    return logits.masked_fill(logits < best + min_p.log().unsqueeze(1), float("-inf"))


def sample(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    child: Tensor,
    position: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a token a row, int64 [num_rows], and whether it is none, int32 [num_rows].

    `logits` [num_rows, vocab_size] of any float dtype; `temperature` float32, of which 0 is greedy;
    `seed`, `child`, `position` int64; `filters` are top_k int64, top_p and min_p float32, applied
    in this order after the temperature. All are [num_rows]; nothing is read back to the host. A
    row with NaN, +inf or no finite logit gets 1 in the second tensor and some token.
    Source: `quire.interfaces.sampling.Sampler` defines the draw.
    """
    if logits.is_cuda and (kernels := _kernels("sampling")):
        drawn: tuple[Tensor, Tensor] = kernels.sample(
            logits, temperature, seed, child, position, filters
        )
        return drawn
    best, token_ids = logits.max(dim=-1)
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    if filters is not None:
        top_k, top_p, min_p = filters
        scaled = keep_min_p(keep_top_k_top_p(scaled, top_k, top_p), min_p)
    token_ids = torch.where(temperature > 0, draw(scaled, seed, child, position), token_ids)
    return token_ids, best.isfinite().logical_not_().int()
