"""Costs that kernels tell, as a profile uses them."""

from __future__ import annotations

import pytest

from quire.benchmark.kernel_costs import KernelCosts, listening


class Launch:
    """What Triton gives a hook."""

    def __init__(self, **told: object) -> None:
        self.told = told

    def get(self) -> dict[str, object]:
        return self.told


def test_average_call_is_what_is_known_of_a_kernel() -> None:
    costs = KernelCosts()
    costs.add("gemv", flops=10, num_bytes=100)
    costs.add("gemv", flops=30, num_bytes=200)

    assert costs.of("gemv", 4) == (80, 600)
    assert costs.of("another", 1) is None


def test_launches_are_heard_inside_only() -> None:
    knobs = pytest.importorskip("triton").knobs
    costs = KernelCosts()
    launch, silent = Launch(name="norm", bytes=7, flops=0), Launch(name="copy")

    with listening(costs):
        for _ in range(2):
            knobs.runtime.launch_enter_hook(launch)
        knobs.runtime.launch_enter_hook(silent)
    if knobs.runtime.launch_enter_hook is not None:
        knobs.runtime.launch_enter_hook(launch)

    assert costs.of("norm", 1) == (0, 7)
    assert costs.totals["norm"].calls == 2
    assert "copy" not in costs.totals
