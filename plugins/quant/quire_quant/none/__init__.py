"""Quantization `none`: weights stay in the model's dtype."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `none`."""
    return [
        QuantizationPlugin(
            name="none",
            load="quire_quant.none.method:NoQuantization",
            summary="weights in the model's dtype, prepacked on a CPU; gpt-oss's MXFP4 too",
            formats=("mxfp4",),
        )
    ]
