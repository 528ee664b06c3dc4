"""The part of a class that gives hidden states, and what the class does behind it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# What classes call the module that gives hidden states, where they do not say.
DECODERS = ("model", "transformer", "decoder")


class DecoderOutput:
    """What stands for a decoder's output, of any of Transformers' classes for it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        """Return None for what was not asked for, such as the states of all layers."""
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: int | str | slice) -> Any:
        """Return the hidden states, which come first."""
        if isinstance(key, str):
            return getattr(self, key)
        return (self.last_hidden_state,)[key]

    def keys(self) -> tuple[str]:
        """Return what there is, for classes that make an output of their own of it."""
        return ("last_hidden_state",)


def decoder_of(net: Any) -> Any:
    """Return the module that gives hidden states, None where a class has none of its own."""
    named = (net.get_decoder(), net.base_model, *(getattr(net, n, None) for n in DECODERS))
    head = net.get_output_embeddings()
    modules = (one for one in named if isinstance(one, nn.Module))
    return next((one for one in modules if one is not net and one is not head), None)


def behind_decoder(net: Any, hidden: Tensor) -> Tensor:
    """Return what the class makes of hidden states [num_rows, hidden_size]: its logits."""
    decoder = decoder_of(net)
    decoder.forward = lambda *_, **__: DecoderOutput(hidden[None])
    try:
        found: Tensor = net(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        del decoder.forward
    return found
