"""Quantization `fp8`: weights and activations in e4m3, read in four formats or made at load."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `fp8`."""
    return [
        QuantizationPlugin(
            name="fp8",
            load="quire_quant.fp8.method:Fp8",
            quantizer="quire_quant.fp8.quantizer:Fp8Quantizer",
            summary="weights and activations in e4m3, with scales a tensor, channel or block",
            formats=("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors:float-quantized"),
            on_the_fly=True,
        )
    ]
