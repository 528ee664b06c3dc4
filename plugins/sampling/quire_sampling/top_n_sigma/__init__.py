"""Logits processor `top_n_sigma`: keep the tokens within n standard deviations of the best."""

from quire import hookimpl
from quire.interfaces.plugin import LogitsProcessorPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_logits_processors() -> list[LogitsProcessorPlugin]:
    """Offer `top_n_sigma`."""
    return [
        LogitsProcessorPlugin(
            name="top_n_sigma",
            load="quire_sampling.top_n_sigma.processor:TopNSigma",
            summary="keep tokens within n standard deviations of the best logit",
        )
    ]
