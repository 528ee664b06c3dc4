"""Sampler `reference`: plain PyTorch, the oracle of the others."""

from quire import hookimpl
from quire.interfaces.plugin import SamplerPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_samplers() -> list[SamplerPlugin]:
    """Offer `reference` on every device."""
    return [
        SamplerPlugin(
            name="reference",
            load="quire_sampling.reference.sampler:ReferenceSampler",
            priority={"cpu": 0, "cuda": 0},
            summary="plain PyTorch: greedy, temperature, top-k, top-p, min-p, seeds",
        )
    ]
