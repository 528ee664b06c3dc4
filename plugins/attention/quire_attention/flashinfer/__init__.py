"""Attention backend `flashinfer`: the kernels of flashinfer-python, over pages."""

from quire import hookimpl
from quire.interfaces.plugin import AttentionPlugin, PluginOption
from quire_attention.flashinfer import library

QUIRE_API_VERSION = (1, 0)

DECODES = ("auto", "paged", "xqa")


def to_decode(text: str) -> str:
    """Return the name of a way to decode. Raises: ValueError for one that there is not."""
    if text not in DECODES:
        raise ValueError(f"is {text!r}; allowed: {', '.join(DECODES)}")
    return text


@hookimpl
def quire_attention_backends() -> list[AttentionPlugin]:
    """Offer `flashinfer`."""
    return [
        AttentionPlugin(
            name="flashinfer",
            load="quire_attention.flashinfer.backend:FlashInferAttention",
            priority={"cuda": 90},
            summary="FlashInfer's kernels: FA2 decode, FA3 prefill on Hopper, XQA decode by option",
            build="quire_attention.flashinfer.library:build",
            is_built=library.is_built,
            why_unusable=library.why_unusable,
            options={
                "decode": PluginOption(
                    meaning="kernel of sequences with one token: paged is planned on the host "
                    "once a step, xqa is not planned; auto is paged",
                    default="auto",
                    parse=to_decode,
                )
            },
        )
    ]
