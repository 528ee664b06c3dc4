"""Quantization `pack-quantized`: weights of 4 and 8 bits as compressed-tensors packs them."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin
from quire_kernels.packed import library

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `pack-quantized`."""
    return [
        QuantizationPlugin(
            name="pack-quantized",
            load="quire_quant.pack_quantized.method:PackQuantized",
            formats=("compressed-tensors:pack-quantized",),
            build="quire_kernels.packed.library:build",
            is_built=library.is_built,
            summary="weights of 4 and 8 bits as compressed-tensors packs them",
        )
    ]
