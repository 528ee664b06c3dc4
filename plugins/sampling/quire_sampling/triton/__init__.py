"""Sampler `triton`: one fused pass over the logits, the default on a GPU."""

from __future__ import annotations

import importlib.util

from quire import hookimpl
from quire.interfaces.plugin import SamplerPlugin

QUIRE_API_VERSION = (1, 0)


def why_unusable() -> str | None:
    """Ask for Triton without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` adds it"
    return None


@hookimpl
def quire_samplers() -> list[SamplerPlugin]:
    """Offer `triton` on GPUs."""
    return [
        SamplerPlugin(
            name="triton",
            load="quire_sampling.triton.sampler:TritonSampler",
            priority={"cuda": 100},
            summary="fused: greedy, temperature, top-k, top-p, min-p, seeds, without a sort",
            why_unusable=why_unusable,
        )
    ]
