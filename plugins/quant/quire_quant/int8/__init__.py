"""Quantization `int8` and `int8-weight-only`: rounded at load, or by compressed-tensors."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin
from quire_kernels.packed import library

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `int8` and `int8-weight-only`."""
    return [
        QuantizationPlugin(
            name="int8",
            load="quire_quant.int8.method:Int8",
            quantizer="quire_quant.int8.quantizer:Int8Quantizer",
            summary="weights in 8 bits with a scale an output, activations with one a token",
            formats=("compressed-tensors:int-quantized",),
            on_the_fly=True,
        ),
        QuantizationPlugin(
            name="int8-weight-only",
            load="quire_quant.int8.method:Int8WeightOnly",
            build="quire_kernels.packed.library:build",
            is_built=library.is_built,
            summary="weights in 8 bits with a scale an output, activations as they are, on the fly",
            on_the_fly=True,
        ),
    ]
