"""Attention by PyTorch's scaled_dot_product_attention (SDPA) over gathered tokens.

Sequences with one token are attended together: their tokens are gathered side by side and a mask
hides what lies beyond each length. Sequences with more tokens are attended one by one. Nothing
that a query may not see is read: a NaN there would pass through the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor

from quire.interfaces.attention import (
    QUANTIZED_KV_DTYPES,
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchLimits,
    KVLayout,
)
from quire.interfaces.batch import Batch
from quire.layers.quantized_cache import as_bytes, dequantize, quantize


@frozen(kw_only=True)
class Together:
    """Sequences with one token: where their visible tokens lie.

    Where all are equally long, their `blocks` are gathered and `visible` of each one's tokens
    attended; else the `slots` [num_seqs * width], with `mask` [num_seqs, 1, 1, width] added.
    `distance`, of the same shape or [width], is how far each token lies back, for ALiBi.
    """

    num_seqs: int
    blocks: Tensor | None = None
    visible: slice = slice(0)
    slots: Tensor | None = None
    mask: Tensor | None = None
    distance: Tensor | None = None


@frozen(kw_only=True)
class Alone:
    """A sequence with several tokens, this step's `tokens` of the batch.

    `visible` are the tokens to attend of those in `blocks`, or of the step's where `blocks` is
    None because all keys are in this step as they were written. `mask` [1, 1, queries, keys] is
    added to the scores; None: plainly causal, or not at all. `distance` is of its shape, for ALiBi.
    """

    tokens: slice
    visible: slice
    blocks: Tensor | None
    mask: Tensor | None
    distance: Tensor | None = None


@frozen(kw_only=True)
class SdpaPlan:
    """What all layers of a step share."""

    slots: Tensor
    together: Together | None
    alone: list[Alone]


class SdpaAttention(AttentionBackend):
    """Serve causal and bidirectional attention with windows and ALiBi; no soft cap or sinks.

    A quantized cache is made wide where it is gathered.
    """

    quantized_kv = QUANTIZED_KV_DTYPES

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        """Refuse what scaled_dot_product_attention cannot express."""
        reasons = {
            "latent attention": spec.latent is not None,
            "logit soft cap": spec.logit_softcap is not None,
            "attention sinks": spec.sinks,
            "batch invariance": spec.batch_invariant,
            "a KV cache in another dtype than the model's": not spec.has_quantized_kv
            and spec.kv_dtype != spec.dtype,
        }
        missing = [name for name, needed in reasons.items() if needed]
        return f"it has no {', no '.join(missing)}" if missing else None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        """Return [block_size, num_kv_heads, head_dim + value_head_dim]: key, then value.

        A block is one contiguous piece, so that gathering copies whole blocks.
        """
        width = spec.head_dim + spec.value_head_dim
        shape = (spec.block_size, spec.num_kv_heads, width)
        return KVLayout(name="token-head-kv", block_shape=shape, dtype=spec.kv_dtype)

    def __init__(
        self, spec: AttentionSpec, limits: BatchLimits, options: Mapping[str, Any]
    ) -> None:
        super().__init__(spec, limits, options)
        # The queries of a head group are rows of one product: 32 sequences of 160 tokens, 4 heads
        # in groups of 2, 1955 -> 482 us on two AMD cores. With AMX PyTorch is faster at single
        # queries: 481 us against 769.
        is_amx = torch.cpu._is_amx_tile_supported()
        self._one_query_a_product = spec.device == "cpu" and spec.dtype == "bfloat16" and is_amx

    def plan(self, batch: Batch, group: int) -> SdpaPlan:
        """Split the batch; masks are made once here and added in every layer."""
        tables = batch.groups[group].block_table
        num_single = batch.num_single_token_seqs
        together = self._plan_together(batch, tables, num_single) if num_single else None
        alone, first = [], num_single
        for row in range(num_single, len(batch.query_lens)):
            query_len, seq_len = batch.query_lens[row], batch.seq_lens_bound[row]
            alone.append(self._plan_alone(first, query_len, seq_len, tables[row]))
            first += query_len
        slots = batch.groups[group].slot_mapping.long()
        return SdpaPlan(slots=slots, together=together, alone=alone)

    def _plan_together(self, batch: Batch, tables: Tensor, num_seqs: int) -> Together:
        longest = max(batch.seq_lens_bound[:num_seqs])
        shortest = min(batch.seq_lens_bound[:num_seqs])
        size, window = self.spec.block_size, self.spec.sliding_window or longest
        width = min(longest, window)
        if shortest == longest:
            # One slice hides the same tokens in all: whole blocks are gathered, and no mask.
            blocks, visible = _cut(tables[:num_seqs], longest - width, longest, size)
            distance = None
            if self.spec.alibi:
                distance = torch.arange(width - 1, -1, -1, device=tables.device)
            return Together(
                num_seqs=num_seqs, blocks=blocks.flatten(), visible=visible, distance=distance
            )
        lengths = batch.seq_lens[:num_seqs, None]
        positions = torch.arange(width, device=tables.device) + (lengths - width).clamp_(min=0)
        hidden = positions >= lengths
        # What is hidden is read from the sequence's last token instead, which is always good.
        positions = torch.minimum(positions, lengths - 1)
        # Sizes are powers of two: shifts take 10 us for [16, 256] on one core, divisions 42 us.
        shift = size.bit_length() - 1
        positions = positions.long()
        blocks = tables[:num_seqs].long().gather(1, positions >> shift)
        slots = (blocks << shift) | (positions & (size - 1))
        mask = self._to_mask(hidden).view(num_seqs, 1, 1, width)
        distance = None
        if self.spec.alibi:
            distance = (lengths - 1 - positions).view(num_seqs, 1, 1, width)
        return Together(num_seqs=num_seqs, slots=slots.flatten(), mask=mask, distance=distance)

    def _plan_alone(self, first: int, query_len: int, seq_len: int, table: Tensor) -> Alone:
        spec, past = self.spec, seq_len - query_len
        begin = 0
        if spec.sliding_window is not None:
            begin = max(0, past - spec.sliding_window + 1)
        blocks, visible = None, slice(0, seq_len)
        # What is stored is not what was written, in a quantized cache.
        if past or spec.has_quantized_kv:
            blocks, visible = _cut(table, begin, seq_len, spec.block_size)
        mask, distance = None, None
        windowed = spec.sliding_window is not None and spec.sliding_window < seq_len
        if windowed or (past and spec.causal) or spec.alibi:
            queries = torch.arange(past, seq_len, device=table.device)[:, None]
            distance = queries - torch.arange(begin, seq_len, device=table.device)
            mask = self._to_mask(self._hidden(distance))
        tokens = slice(first, first + query_len)
        return Alone(tokens=tokens, visible=visible, blocks=blocks, mask=mask, distance=distance)

    def _hidden(self, distance: Tensor) -> Tensor:
        hidden = distance < 0 if self.spec.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.spec.sliding_window is not None:
            hidden = hidden | (distance >= self.spec.sliding_window)
        return hidden

    def _to_mask(self, hidden: Tensor) -> Tensor:
        dtype = getattr(torch, self.spec.dtype)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))

    def write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor, plan: SdpaPlan
    ) -> None:
        """Store each token's key and value in its slot."""
        if layer.k_scale is not None and layer.v_scale is not None:
            k = quantize(k, layer.k_scale, kv_cache.dtype)
            v = quantize(v, layer.v_scale, kv_cache.dtype)
        flat = kv_cache.view(-1, *kv_cache.shape[2:])
        as_bytes(flat).index_copy_(0, plan.slots, as_bytes(torch.cat((k, v), dim=-1)))

    def _split(self, layer: AttentionLayer, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of gathered tokens [..., num_kv_heads, width], wide.

        Tokens of a quantized cache come as bytes.
        """
        kv = kv.view(getattr(torch, self.spec.kv_dtype))
        keys, values = kv[..., : self.spec.head_dim], kv[..., self.spec.head_dim :]
        if layer.k_scale is None or layer.v_scale is None:
            return keys, values
        dtype = getattr(torch, self.spec.dtype)
        return (
            dequantize(keys, layer.k_scale, dtype),
            dequantize(values, layer.v_scale, dtype),
        )

    def attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: SdpaPlan,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """Attend the sequences with one token together, the others one by one."""
        if lse is not None:
            raise NotImplementedError("sdpa does not give the log-sum-exp; use reference")
        if plan.together is not None and kv_cache is not None:
            self._attend_together(layer, q, kv_cache, plan.together, out)
        elif plan.together is not None:
            # Without a cache a sequence of one token sees itself alone.
            own = v[: plan.together.num_seqs]
            out[: len(own)] = own.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        for part in plan.alone:
            keys, values = self._keys_and_values(layer, k, v, kv_cache, part)
            self._attend_alone(layer, q, keys, values, part, out)

    def _attend_together(
        self, layer: AttentionLayer, q: Tensor, kv_cache: Tensor, part: Together, out: Tensor
    ) -> None:
        num_seqs = part.num_seqs
        if part.blocks is not None:
            kv = as_bytes(kv_cache).index_select(0, part.blocks)
            kv = kv.view(num_seqs, -1, *kv_cache.shape[2:])
            kv = kv[:, part.visible]
        else:
            assert part.slots is not None
            kv = as_bytes(kv_cache).flatten(0, 1).index_select(0, part.slots)
            kv = kv.unflatten(0, (num_seqs, -1))
        keys, values = (x.transpose(1, 2) for x in self._split(layer, kv))
        heads = q.shape[1] if self._one_query_a_product else keys.shape[1]
        result = functional.scaled_dot_product_attention(
            q[:num_seqs].unflatten(1, (heads, -1)),
            keys,
            values,
            attn_mask=self._biased(layer, part, heads),
            scale=self.spec.scale,
            enable_gqa=heads != keys.shape[1],
        )
        out[:num_seqs] = result.flatten(1, 2)

    def _biased(
        self, layer: AttentionLayer, part: Together | Alone, num_products: int
    ) -> Tensor | None:
        """Return what is added to scores [.., products, queries of each, keys], ALiBi included."""
        if layer.alibi_slopes is None or part.distance is None:
            return part.mask
        slopes = layer.alibi_slopes.view(1, num_products, -1, 1)
        bias = (slopes * -part.distance).to(getattr(torch, self.spec.dtype))
        return bias if part.mask is None else bias + part.mask

    def _keys_and_values(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, kv_cache: Tensor | None, part: Alone
    ) -> tuple[Tensor, Tensor]:
        """Return what a sequence attends to, [num_keys, num_kv_heads, dim] each."""
        if kv_cache is None or part.blocks is None:
            return k[part.tokens], v[part.tokens]
        kv = as_bytes(kv_cache).index_select(0, part.blocks).flatten(0, 1)[part.visible]
        return self._split(layer, kv)

    def _attend_alone(
        self,
        layer: AttentionLayer,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        part: Alone,
        out: Tensor,
    ) -> None:
        mask = self._biased(layer, part, q.shape[1])
        result = functional.scaled_dot_product_attention(
            q[part.tokens].transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=self.spec.causal and mask is None,
            scale=self.spec.scale,
            enable_gqa=True,
        )
        out[part.tokens] = result.squeeze(0).transpose(0, 1)


def _cut(table: Tensor, begin: int, end: int, block_size: int) -> tuple[Tensor, slice]:
    """Return the blocks that hold positions [begin, end), and where these lie in them.

    `table` [max_blocks], or [num_seqs, max_blocks] for several sequences.
    """
    first = begin // block_size
    blocks = table[..., first : -(-end // block_size)]
    return blocks, slice(begin - first * block_size, end - first * block_size)
