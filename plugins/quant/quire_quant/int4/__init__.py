"""Quantization `int4`: weights of a full-precision checkpoint rounded to 4 bits while loading."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin
from quire_kernels.packed import library

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `int4`."""
    return [
        QuantizationPlugin(
            name="int4",
            load="quire_quant.int4.method:Int4",
            quantizer="quire_quant.int4.quantizer:Int4Quantizer",
            on_the_fly=True,
            build="quire_kernels.packed.library:build",
            is_built=library.is_built,
            summary="linear weights rounded to 4 bits in groups of up to 128 inputs, on the fly",
        )
    ]
