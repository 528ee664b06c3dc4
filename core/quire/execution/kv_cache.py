"""The memory of the KV blocks: layers with equal needs form a group, each layer has one tensor."""

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
from quire.interfaces.attention import AttentionBackend, AttentionSpec, BatchLimits, KVLayout
from quire.interfaces.model import Model
from quire.layers.attention import Attention
from quire.layers.quantized_cache import as_bytes
from quire.patience import telling
from quire.scheduling.output import KVCacheGroup

Answer = TypeVar("Answer")


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
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers of the group."""
        if not self.has_cache:
            return 0
        size = torch.empty(0, dtype=getattr(torch, self.layout.dtype)).element_size()
        return len(self.layers) * math.prod(self.layout.block_shape) * size

    def to_cache_group(self, num_blocks: int) -> KVCacheGroup:
        """Return the group as the block manager sees it."""
        return KVCacheGroup(
            layers=tuple(layer.index for layer in self.layers),
            block_size=self.spec.block_size,
            bytes_per_block=self.bytes_per_block,
            num_blocks=num_blocks,
            window=self.spec.sliding_window,
        )


def cache_groups(
    groups: Sequence[LayerGroup], num_blocks: int, max_model_len: int
) -> list[KVCacheGroup]:
    """Return the groups as the block manager sees them.

    Where nothing is kept, a sequence of any length has one block, which holds nothing.
    """
    if any(group.has_cache for group in groups):
        return [group.to_cache_group(num_blocks) for group in groups]
    size = 1 << (max_model_len - 1).bit_length()
    empty = KVCacheGroup(layers=(), block_size=size, bytes_per_block=0, num_blocks=num_blocks)
    return [empty] * max(1, len(groups))


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
    """One tensor [num_blocks, *block_shape] a layer, bound to it; none for an encoder's."""

    def __init__(self, groups: Sequence[LayerGroup], num_blocks: int, device: torch.device) -> None:
        self.tensors: list[list[Tensor]] = []
        for group in groups:
            if not group.has_cache:
                self.tensors.append([])
                continue
            shape = (num_blocks, *group.layout.block_shape)
            dtype = getattr(torch, group.layout.dtype)
            self.tensors.append([_zeros(shape, dtype, device) for _ in group.layers])

    def bind(self, groups: Sequence[LayerGroup], backends: Sequence[AttentionBackend]) -> None:
        """Give every layer its backend and tensor."""
        for number, (group, backend) in enumerate(zip(groups, backends, strict=True)):
            tensors = self.tensors[number] if group.has_cache else [None] * len(group.layers)
            for layer, tensor in zip(group.layers, tensors, strict=True):
                layer.bind(backend, tensor, number)

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy whole blocks: (group, source, destination)."""
        for number, tensors in enumerate(self.tensors):
            pairs = [(src, dst) for group, src, dst in copies if group == number]
            if not pairs:
                continue
            index = torch.tensor(pairs, dtype=torch.int64).T.to(tensors[0].device)
            for tensor in map(as_bytes, tensors):
                tensor.index_copy_(0, index[1], tensor.index_select(0, index[0]))


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
