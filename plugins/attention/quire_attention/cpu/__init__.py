"""Attention backend `cpu`: C++ with AVX-512 or AVX2, the default on a CPU once it is built."""

from quire import hookimpl
from quire.interfaces.plugin import AttentionPlugin, PluginOption
from quire_kernels.cpu import ISAS, LIBRARY

QUIRE_API_VERSION = (1, 0)


def parse_isa(text: str) -> str:
    """Return an instruction set's name. Raises: ValueError."""
    if text not in ("auto", *ISAS):
        raise ValueError(f"{text!r} is no instruction set; allowed: auto, {', '.join(ISAS)}")
    return text


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer `cpu`."""
    return [
        AttentionPlugin(
            name="cpu",
            load="quire_attention.cpu.backend:CpuAttention",
            priority={"cpu": 200},
            options={
                "isa": PluginOption(
                    meaning="instruction set of the kernels", default="auto", parse=parse_isa
                )
            },
            summary="C++ over paged blocks, AVX-512 or AVX2: split-KV decode, chunked prefill",
            why_unusable=LIBRARY.why_unusable,
            build="quire_kernels.cpu:build",
            is_built=LIBRARY.is_built,
            builds_in_background=True,
        )
    ]
