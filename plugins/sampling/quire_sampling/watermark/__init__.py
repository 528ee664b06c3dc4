"""Logits processor `watermark`: make an answer recognisable by which tokens it prefers."""

from quire import hookimpl
from quire.interfaces.plugin import LogitsProcessorPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_logits_processors() -> list[LogitsProcessorPlugin]:
    """Offer `watermark`."""
    return [
        LogitsProcessorPlugin(
            name="watermark",
            load="quire_sampling.watermark.processor:Watermark",
            summary="favour tokens that a keyed hash of the token before makes green",
        )
    ]
