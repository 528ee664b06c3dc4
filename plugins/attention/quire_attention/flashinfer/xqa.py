"""The library's XQA kernels: decodes that read block table and lengths on the device, unplanned."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from quire.errors import BuildError
from quire.interfaces.attention import AttentionLayer, AttentionSpec, BatchLimits
from quire_kernels.head_token_kv import keys_and_values

BLOCK_SIZES = (16, 32, 64, 128)
LARGEST_GROUP = 32
GENERATIONS = (9, 10, 12)
# For the partial results of as many blocks as run at once.
SCRATCH_BYTES = 32 << 20


def why_unsupported(spec: AttentionSpec, capability: tuple[int, int]) -> str | None:
    """Return why the kernels cannot serve a spec that the backend serves, or None."""
    group = spec.num_heads // spec.num_kv_heads
    reasons = {
        f"blocks of {spec.block_size}, only of {BLOCK_SIZES}": spec.block_size not in BLOCK_SIZES,
        "soft cap": spec.logit_softcap is not None,
        f"{group} query heads a KV head, at most {LARGEST_GROUP}": group > LARGEST_GROUP,
        f"kernels for compute capability {capability[0]}.{capability[1]}": capability[0]
        not in GENERATIONS,
    }
    missing = [name for name, needed in reasons.items() if needed]
    return f"it has no {', no '.join(missing)}" if missing else None


@frozen(kw_only=True)
class XqaRows:
    """The first rows of a batch, with one token each; where padded, some have length 0."""

    block_table: Tensor
    seq_lens: Tensor
    is_padded: bool


class XqaAttention:
    """Attend sequences with one token. Raises: BuildError where the module cannot be compiled."""

    def __init__(self, spec: AttentionSpec, limits: BatchLimits, scratch: Tensor) -> None:
        self.spec, self._scratch = spec, scratch
        num_marks = limits.max_num_seqs * spec.num_heads
        self._arrived = torch.zeros(num_marks, dtype=torch.int32, device=scratch.device)
        self._xqa = _loaded(spec)

    def run(
        self, layer: AttentionLayer, rows: XqaRows, q: Tensor, kv_cache: Tensor, out: Tensor
    ) -> None:
        """Attend q [num_rows, num_heads, head_dim] into `out`, which is contiguous.

        The kernel reads a key whatever the length is: padding has length 1 for it, and becomes
        zeros afterwards.
        """
        spec, seq_lens, found = self.spec, rows.seq_lens, out
        if rows.is_padded:
            seq_lens, found = seq_lens.clamp(min=1), torch.empty_like(out)
        sinks = layer.sinks
        self._xqa(
            q.contiguous().unsqueeze(1),
            *keys_and_values(kv_cache, spec.head_dim),
            rows.block_table.contiguous(),
            seq_lens.unsqueeze(1),
            found.unsqueeze(1),
            self._scratch,
            self._arrived,
            spec.num_kv_heads,
            spec.block_size,
            sinks=None if sinks is None else sinks.reshape(spec.num_kv_heads, -1),
            # It divides by the root of the head's size itself.
            q_scale=spec.scale * math.sqrt(spec.head_dim),
            sliding_win_size=spec.sliding_window or 0,
        )
        if rows.is_padded:
            is_padding = (rows.seq_lens == 0)[:, None, None]
            out.copy_(found.masked_fill_(is_padding, 0))


def _loaded(spec: AttentionSpec) -> Callable[..., None]:
    """Return the library's function, its module compiled where it is not there yet."""
    from flashinfer.xqa import get_xqa_module, xqa

    dtype = getattr(torch, spec.dtype)
    group = spec.num_heads // spec.num_kv_heads
    has_window = spec.sliding_window is not None
    sizes = (spec.block_size, spec.head_dim, group)
    try:
        get_xqa_module(dtype, dtype, *sizes, has_window, dtype, 1)
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f"flashinfer's XQA module cannot be compiled: {error}. "
            f"Use --attention-option flashinfer.decode=paged."
        ) from error
    return xqa
