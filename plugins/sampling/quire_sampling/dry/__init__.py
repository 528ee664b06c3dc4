"""Logits processor `dry`: penalise tokens that would go on with a repetition."""

from quire import hookimpl
from quire.interfaces.plugin import LogitsProcessorPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_logits_processors() -> list[LogitsProcessorPlugin]:
    """Offer `dry`."""
    return [
        LogitsProcessorPlugin(
            name="dry",
            load="quire_sampling.dry.processor:Dry",
            summary="penalise a token the more, the longer the repetition that it goes on with",
        )
    ]
