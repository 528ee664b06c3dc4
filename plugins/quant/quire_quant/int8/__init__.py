"""Quantization `int8`: weights and activations in 8 bits, made of a full-precision checkpoint."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `int8`."""
    return [
        QuantizationPlugin(
            name="int8",
            load="quire_quant.int8.method:Int8",
            summary="weights in 8 bits with a scale an output, activations with one a token",
            on_the_fly=True,
        )
    ]
