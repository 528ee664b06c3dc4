"""Count the bytes of the tensors that are alive, and the most there were at one time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """While it is entered: storages that operations make, until nobody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if storage._cdata not in given:
                self._count(storage)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def forget(_: object) -> None:
            del self._seen[key]
            self.bytes -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in tree_iter(values):
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            continue
        if tensor.layout is torch.strided:  # others have none
            yield tensor.untyped_storage()
