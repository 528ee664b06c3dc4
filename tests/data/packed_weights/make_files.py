"""Write gptqmodel.safetensors and autoawq.safetensors with the tools themselves, one layer a case.

    pip install gptqmodel autoawq && python make_files.py

What was committed came from gptqmodel 7.7.0 and autoawq 0.2.9. Each case has the tensors that the
tool writes and `weight` [out, in], what the tool itself makes of them. Only zero points above
zero are written in version 1: GPTQModel's subtraction borrows from the next one at zero.
"""

from pathlib import Path

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
INPUTS, OUTPUTS, GROUP = 64, 32, 32


def draw(bits, seed, lowest_zero):
    """Return codes, zeros and scales as the tools take them, and each input's group."""
    generator = torch.Generator().manual_seed(seed)
    shape = (OUTPUTS, INPUTS // GROUP)
    codes = torch.randint(0, 2**bits, (OUTPUTS, INPUTS), generator=generator)
    zeros = torch.randint(lowest_zero, 2**bits, shape, generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.02 + 0.01).half().float()
    order = torch.randperm(INPUTS, generator=generator)
    return codes, zeros, scales, (torch.arange(INPUTS) // GROUP)[order]


def linear_of(codes, zeros, scales, groups):
    """Return a plain layer whose weight is that of the codes."""
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
    return linear


def gptq_case(bits, version):
    """Return the tensors of one layer by GPTQModel, and the weight that it reads back."""
    codes, zeros, scales, groups = draw(bits, bits, 2 - version)
    layer = TorchLinear(
        bits=bits,
        group_size=GROUP,
        sym=False,
        desc_act=True,
        in_features=INPUTS,
        out_features=OUTPUTS,
    )
    layer.pack_original(
        linear=linear_of(codes, zeros, scales, groups),
        scales=scales,
        zeros=zeros.float(),
        g_idx=groups.int(),
    )
    weight = layer.dequantize_weight().T.float()
    if version == 1:
        config = QuantizeConfig(bits=bits, group_size=GROUP)
        convert_gptq_v2_to_v1_format_module(layer, config)
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(layer, name) for name in names} | {"weight": weight}


def awq_case():
    """Return the tensors of one layer by AutoAWQ, and the weight that it reads back."""
    codes, zeros, scales, _ = draw(4, 0, 0)
    linear = linear_of(codes, zeros, scales, torch.arange(INPUTS) // GROUP)
    layer = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP)
    names = ("qweight", "qzeros", "scales")
    return {name: getattr(layer, name) for name in names} | {"weight": weight.T}


def save(name, cases):
    """Write cases into one file."""
    tensors = {
        f"{case}.{key}": t.contiguous() for case, ts in cases.items() for key, t in ts.items()
    }
    save_file(tensors, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    cases = {f"bits{bits}.v{v}": gptq_case(bits, v) for bits in (2, 3, 4, 8) for v in (1, 2)}
    save("gptqmodel", cases)
    save("autoawq", {"bits4": awq_case()})
