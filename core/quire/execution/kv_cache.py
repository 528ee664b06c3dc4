"""The memory of the KV blocks: layers with equal needs form a group, each layer has one tensor.

Where some groups have a window and others have not, or another one, they share slabs, so that the
blocks that windows free serve every group. Memory is rows of blocks of one layer, and slab s is
column s; here slabs of three rows, a group of 3 layers (a, b, c) and one of 1 (x):

    slab     0 1 2 3 4 5 ...           block of the 1st      block of the 2nd
    row 0  | a . x a x . |             s: all rows           s, s + n, s + 2 n: a row each,
    row 1  | b . x b x . |                                   where there are n slabs
    row 2  | c . x c . . |

A layer's tensor begins at its row and goes on to the last row, so that a block's id is its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from attrs import Factory, define
from torch import Tensor

from quire.errors import PluginError, QuireError
from quire.interfaces.attention import (
    AttentionBackend,
    AttentionSpec,
    BatchLimits,
    KVLayout,
    latent_layout,
)
from quire.interfaces.model import Model
from quire.layers.attention import Attention
from quire.layers.quantized_cache import as_bytes
from quire.patience import telling
from quire.scheduling.footprint import slab_rows
from quire.scheduling.output import KVCacheGroup

ANY_LENGTH = 1 << 20  # tokens, more than a sequence may have

Answer = TypeVar("Answer")

# What the address of a layer's tensor is a multiple of, in bytes.
ALIGNMENT = 256


@define(kw_only=True)
class LayerGroup:
    """Layers with one spec, the backend that serves them and the layout that it wants."""

    spec: AttentionSpec
    layers: list[Attention]
    backend_name: str
    backend_class: type[AttentionBackend]
    layout: KVLayout
    options: Mapping[str, Any] = Factory(dict)

    @property
    def has_cache(self) -> bool:
        """Whether keys and values are kept: of an encoder, whose layers are not causal, none."""
        return self.spec.causal

    @property
    def layer_bytes_per_block(self) -> int:
        """Bytes of one block in one layer."""
        if not self.has_cache:
            return 0
        size = torch.empty(0, dtype=getattr(torch, self.layout.dtype)).element_size()
        return math.prod(self.layout.block_shape) * size

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers of the group."""
        return len(self.layers) * self.layer_bytes_per_block


def rows_of_slabs(groups: Sequence[LayerGroup]) -> int | None:
    """Return how many layers' blocks a slab holds, None where groups share none.

    They do not where all have the same window, and so need equally many blocks, nor where a
    layer's block has not the same bytes in all of them.
    """
    if not any(group.has_cache for group in groups):
        return None
    windows = {group.spec.sliding_window for group in groups}
    sizes = {group.layer_bytes_per_block for group in groups}
    if len(windows) == 1 or len(sizes) > 1:
        return None
    return slab_rows(len(group.layers) for group in groups)


def cache_groups(groups: Sequence[LayerGroup], num_blocks: int) -> list[KVCacheGroup]:
    """Return the groups as the block manager sees them, with so many blocks or slabs."""
    if not any(group.has_cache for group in groups):
        return [_empty_group(num_blocks)] * max(1, len(groups))
    rows = rows_of_slabs(groups)
    return [
        KVCacheGroup(
            layers=tuple(layer.index for layer in group.layers),
            block_size=group.spec.block_size,
            bytes_per_block=group.bytes_per_block,
            num_blocks=num_blocks,
            window=group.spec.sliding_window,
            blocks_per_slab=None if rows is None else rows // len(group.layers),
            block_stride=len(group.layers) * _row_length(group, num_blocks),
        )
        for group in groups
    ]


def _empty_group(num_blocks: int) -> KVCacheGroup:
    """Return the group of an encoder: a sequence of any length has one block, of nothing."""
    return KVCacheGroup(layers=(), block_size=ANY_LENGTH, bytes_per_block=0, num_blocks=num_blocks)


def _row_length(group: LayerGroup, num_slabs: int) -> int:
    """Return how many blocks of one layer a row has, so that the next one begins aligned."""
    multiple = ALIGNMENT // math.gcd(group.layer_bytes_per_block, ALIGNMENT)
    return -(-num_slabs // multiple) * multiple


def bytes_per_slab(groups: Sequence[LayerGroup]) -> int:
    """Return the bytes of a slab, or of one block of each group where they share none."""
    rows = rows_of_slabs(groups)
    if rows is None:
        return sum(group.bytes_per_block for group in groups)
    return rows * groups[0].layer_bytes_per_block


def layers_by_spec(
    model: Model, *, dtype: str, kv_dtype: str, block_size: int, device: str
) -> dict[AttentionSpec, list[Attention]]:
    """Return the attention layers of a model, those with equal specs together, in order."""
    found: dict[AttentionSpec, list[Attention]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            spec = module.spec(dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, device=device)
            found.setdefault(spec, []).append(module)
    return found


class KVCache:
    """One tensor [num_blocks, *block_shape] a layer, bound to it; none for an encoder's.

    With `rows` they are parts of one memory of `num_blocks` slabs of so many rows.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        num_blocks: int,
        device: torch.device,
        *,
        rows: int | None = None,
    ) -> None:
        self.tensors: list[list[Tensor]] = []
        shared = None
        if rows is not None:
            length, a_block = _row_length(groups[0], num_blocks), groups[0].layer_bytes_per_block
            shared = _zeros((rows, length, a_block), torch.uint8, device)
        for group in groups:
            if not group.has_cache:
                self.tensors.append([])
                continue
            dtype, shape = getattr(torch, group.layout.dtype), group.layout.block_shape
            self.tensors.append(
                [
                    _zeros((num_blocks, *shape), dtype, device)
                    if shared is None
                    else shared[row:].view(dtype).view(-1, *shape)
                    for row, _ in enumerate(group.layers)
                ]
            )

    def bind(self, groups: Sequence[LayerGroup], backends: Sequence[AttentionBackend]) -> None:
        """Give every layer its backend and tensor."""
        for number, (group, backend) in enumerate(zip(groups, backends, strict=True)):
            tensors = self.tensors[number] if group.has_cache else [None] * len(group.layers)
            for layer, tensor in zip(group.layers, tensors, strict=True):
                layer.bind(backend, tensor, number)

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy whole blocks at once: (group, source, destination)."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, tensors in enumerate(self.tensors):
            pairs = [(src, dst) for group, src, dst in copies if group == number]
            if not pairs:
                continue
            index = torch.tensor(pairs, dtype=torch.int64).T.to(tensors[0].device)
            for tensor in map(as_bytes, tensors):
                found.append((tensor, index[1], tensor.index_select(0, index[0])))
        # A group's destination may be a slab that another group's source has just left.
        for tensor, places, blocks in found:
            tensor.index_copy_(0, places, blocks)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros: a NaN left in memory would pass through a masked product.

    On a CPU they come as pages that the system zeroes when they are touched, so that gigabytes of
    blocks cost neither time nor memory before they are used; `torch.zeros` writes them all.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


def make_backends(groups: Sequence[LayerGroup], limits: BatchLimits) -> list[AttentionBackend]:
    """Make one backend instance a group. Raises: PluginError naming one that cannot be made."""

    def make(group: LayerGroup) -> AttentionBackend:
        return group.backend_class(group.spec, limits, group.options)

    return [ask(g.backend_name, "__init__", partial(make, g)) for g in groups]


def layout_of(name: str, backend: type[AttentionBackend], spec: AttentionSpec) -> KVLayout:
    """Return the layout that a backend wants. Raises: PluginError naming it where it has none."""
    layout = ask(name, "kv_layout", lambda: backend.kv_layout(spec))
    if not isinstance(layout, KVLayout):
        raise _broken(name, f"returns {layout!r} from kv_layout() where a KVLayout is wanted")
    if not isinstance(getattr(torch, str(layout.dtype), None), torch.dtype):
        raise _broken(name, f"wants a KV cache of {layout.dtype!r}, which is no dtype of torch")
    if not layout.block_shape or not all(isinstance(n, int) and n > 0 for n in layout.block_shape):
        wanted = "whole numbers above 0 are wanted"
        raise _broken(name, f"wants KV blocks of shape {layout.block_shape!r}, where {wanted}")
    if spec.latent is not None and layout != latent_layout(spec):
        raise _broken(name, f"keeps latents as {layout}; all backends keep {latent_layout(spec)}")
    return layout


def ask(name: str, method: str, call: Callable[[], Answer]) -> Answer:
    """Return what a backend's method gives. Raises: PluginError naming both where it raises."""
    try:
        with telling(f"{method}() of attention backend {name!r}"):
            return call()
    except (QuireError, torch.cuda.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise _broken(name, f"raises {type(error).__name__} in {method}(): {text}") from error


def _broken(name: str, fact: str) -> PluginError:
    return PluginError(
        f"attention backend {name!r} {fact}. Ask for another with --attention-backend; "
        f"`quire plugins check` says more of this one."
    )
