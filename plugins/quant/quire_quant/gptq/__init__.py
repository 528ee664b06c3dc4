"""Quantization `gptq`: checkpoints of 2, 3, 4 and 8 bits as AutoGPTQ and GPTQModel write them."""

from quire import hookimpl
from quire.interfaces.plugin import QuantizationPlugin
from quire_kernels.packed import library

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_quantization_methods() -> list[QuantizationPlugin]:
    """Offer `gptq`."""
    return [
        QuantizationPlugin(
            name="gptq",
            load="quire_quant.gptq.method:Gptq",
            quantizer="quire_quant.gptq.quantizer:GptqQuantizer",
            formats=("gptq",),
            build="quire_kernels.packed.library:build",
            is_built=library.is_built,
            summary="GPTQ checkpoints of 2, 3, 4 and 8 bits, with and without desc_act",
        )
    ]
