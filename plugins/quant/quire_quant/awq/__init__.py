"""Quantization `awq`: checkpoints of 4 bits in the GEMM layout, as AutoAWQ writes them."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin
from quire_kernels.packed import library

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `awq`."""
    return [
        QuantizationPlugin(
            name="awq",
            load="quire_quant.awq.method:Awq",
            quantizer="quire_quant.awq.quantizer:AwqQuantizer",
            formats=("awq",),
            build="quire_kernels.packed.library:build",
            is_built=library.is_built,
            summary="AWQ checkpoints of 4 bits in the GEMM layout",
        )
    ]
