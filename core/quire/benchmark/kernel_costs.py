"""What each kernel reads, writes and computes a call: as Triton kernels tell it, and by shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import Factory, define


@define
class Total:
    """Sums over calls of one kernel."""

    calls: int = 0
    flops: int = 0
    num_bytes: int = 0


@define
class KernelCosts:
    """Totals by kernel name."""

    totals: dict[str, Total] = Factory(dict)

    def add(self, name: str, *, flops: int, num_bytes: int) -> None:
        """Count a call."""
        total = self.totals.setdefault(name, Total())
        total.calls += 1
        total.flops += flops
        total.num_bytes += num_bytes

    def of(self, name: str, calls: int) -> tuple[int, int] | None:
        """Return FLOPs and bytes of so many average calls; None for an unknown kernel."""
        total = self.totals.get(name)
        if total is None:
            return None
        return total.flops * calls // total.calls, total.num_bytes * calls // total.calls


@contextlib.contextmanager
def listening(costs: KernelCosts) -> Iterator[None]:
    """Count the launches of Triton kernels that tell their costs (`launch_metadata`) meanwhile."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return

    def hear(metadata: Any) -> None:
        told: Mapping[str, Any] = metadata.get()
        if "bytes" in told and "flops" in told:
            costs.add(told["name"], flops=told["flops"], num_bytes=told["bytes"])

    runtime = knobs.runtime
    before = runtime.launch_enter_hook
    if hasattr(before, "add"):
        before.add(hear)
    else:  # one hook and no chain of them, up to Triton 3.4
        runtime.launch_enter_hook = hear
    try:
        yield
    finally:
        if hasattr(before, "remove"):
            before.remove(hear)
        else:
            runtime.launch_enter_hook = before
