"""The attention layer of every model: it owns q/k norm and RoPE, a backend does the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from quire.interfaces.attention import AttentionBackend, AttentionSpec, GraphSupport
from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions
from quire.layers.rotary import RotaryTable


class HeadNorm(nn.Module):
    """The weight of an RMSNorm over a head's dimensions."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class QKNorm:
    """The RMSNorm of q and k: weights `q` and `k` [head_dim], `eps`.

    `weights` [num_heads + num_kv_heads, head_dim] has one of them for each head.
    """

    def __init__(self, q: Tensor, k: Tensor, eps: float, num_heads: tuple[int, int]) -> None:
        self.q = q
        self.k = k
        self.eps = eps
        # One weight a head, so that q and k are normalised together.
        each = (q.expand(num_heads[0], -1), k.expand(num_heads[1], -1))
        self.weights = torch.cat(each)

    def normalise(self, qk: Tensor) -> Tensor:
        """Return the normalised heads of `qk` [num_tokens, num_heads + num_kv_heads, head_dim]."""
        if not qk.is_cpu:
            return functional.rms_norm(qk, self.q.shape, None, self.eps).mul_(self.weights)
        # As quire_kernels.ops.rms_norm: on a CPU PyTorch's own takes five times as long.
        wide = qk.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale.square_().mul_(1 / self.q.shape[0]).add_(self.eps).rsqrt_()
        return wide.mul(scale).to(qk.dtype).mul_(self.weights)


class Attention(nn.Module):
    """Normalise, rotate, write and attend. The runner binds backend and KV cache before use.

    `index` is the layer's number, `name` the module's in the checkpoint, `sinks` float32
    [num_heads] where the model has them. The start sets the scales of a quantized cache.
    """

    backend: AttentionBackend

    def __init__(
        self,
        options: AttentionOptions,
        dtype: torch.dtype,
        device: torch.device,
        *,
        name: str = "",
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.batch_invariant = batch_invariant
        self.options = options
        self.index = options.layer_index
        self.num_heads, self.num_kv_heads = options.num_heads, options.num_kv_heads
        self.head_dim = options.head_dim
        self.rotary = options.rotary
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        slopes = options.alibi_slopes
        self.alibi_slopes: Tensor | None = (
            None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device)
        )
        self.sinks: Tensor | None = None
        self.kv_cache: Tensor | None = None
        self.group = 0
        self.has_fused_write = True
        if options.qk_norm is not None:
            shape = (options.head_dim,)
            self.q_norm = HeadNorm(_parameter(shape, dtype, device))
            self.k_norm = HeadNorm(_parameter(shape, dtype, device))
        if options.sinks:
            self.sinks = _parameter((options.num_heads,), torch.float32, device)

    def spec(self, *, dtype: str, kv_dtype: str, block_size: int, device: str) -> AttentionSpec:
        """Return what the layer asks of a backend; layers with equal specs form a group."""
        o = self.options
        return AttentionSpec(
            num_heads=o.num_heads,
            num_kv_heads=o.num_kv_heads,
            head_dim=o.head_dim,
            value_head_dim=o.head_dim,
            scale=o.scale,
            dtype=dtype,
            kv_dtype=kv_dtype if o.causal else dtype,  # an encoder keeps none
            block_size=block_size,
            device=device,
            sliding_window=o.sliding_window,
            logit_softcap=o.logit_softcap,
            sinks=o.sinks,
            alibi=o.alibi_slopes is not None,
            causal=o.causal,
            batch_invariant=self.batch_invariant,
        )

    def bind(self, backend: AttentionBackend, kv_cache: Tensor | None, group: int) -> None:
        """Give the layer its backend, its part of the KV cache and its group's number."""
        self.backend, self.kv_cache, self.group = backend, kv_cache, group
        fused = type(backend).rotate_and_write is not AttentionBackend.rotate_and_write
        self.has_fused_write = fused
        self.qk_norm = None
        if self.options.qk_norm is not None:
            num_heads = (self.num_heads, self.num_kv_heads)
            q, k = self.q_norm.weight.data, self.k_norm.weight.data
            self.qk_norm = QKNorm(q, k, self.options.qk_norm, num_heads)

    def forward(self, qkv: Tensor, batch: Batch) -> Tensor:
        """Return [num_tokens, num_heads * head_dim].

        `qkv` [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v heads in order. It
        may be changed in place.
        """
        plan = batch.plans[self.group]
        num_tokens = qkv.shape[0]
        heads = qkv.view(num_tokens, -1, self.head_dim)
        split = self.num_heads + self.num_kv_heads
        # Backends leave the rows that pad a captured step, where later layers must find numbers.
        is_padded = batch.captured_for is GraphSupport.ANY
        make = qkv.new_zeros if is_padded else qkv.new_empty
        out = make(num_tokens, self.num_heads, self.head_dim)
        k, v = heads[:, self.num_heads : split], heads[:, split:]
        q = self._fused(qkv, batch, plan) if self.has_fused_write else None
        if q is None:
            qk = heads[:, :split]
            qk = normalise_and_rotate(qk, batch.positions, self.rotary, self.qk_norm)
            q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
            if self.kv_cache is not None:
                self.backend.write(self, k, v, self.kv_cache, plan)
        self.backend.attend(self, q, k, v, self.kv_cache, plan, out)
        return out.view(num_tokens, -1)

    def _fused(self, qkv: Tensor, batch: Batch, plan: object) -> Tensor | None:
        if self.kv_cache is None:
            return None
        return self.backend.rotate_and_write(
            self, qkv, batch.positions, self.rotary, self.qk_norm, self.kv_cache, plan
        )


def normalise_and_rotate(
    qk: Tensor, positions: Tensor, rotary: RotaryTable | None, qk_norm: QKNorm | None
) -> Tensor:
    """Return the q and k heads of `qk` [num_tokens, num_heads, head_dim], normed and rotated."""
    if qk_norm is not None:
        qk = qk_norm.normalise(qk)
    return qk if rotary is None else rotary.rotate(qk, positions)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
