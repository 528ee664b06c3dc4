"""Model `qwen3-moe`: the Qwen3 models with experts."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import flag, key, shown, whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.decoder_config import check_uniform_layers
from quire_models.mixture_config import MOST_EXPERTS, SparseConfig

QUIRE_API_VERSION = (1, 0)


def _only(value: bool) -> Any:
    """Declare a key of which the class honours one value."""
    return key(value, check=lambda given: given is value, allowed=shown(value))


@frozen(kw_only=True)
class Qwen3MoeConfig(SparseConfig):
    """Keys of Qwen3MoeForCausalLM, with the defaults of Transformers.

    A window is that of all layers: `max_window_layers` is read by nobody.
    """

    vocab_size: int = whole(151936, 1, 2**24)
    hidden_size: int = whole(2048, 1, 2**17)
    intermediate_size: int = whole(6144, 1, 2**20)
    num_hidden_layers: int = whole(24, 1, 1024)
    given_num_kv_heads: int | None = whole(
        4, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    max_position_embeddings: int = whole(32768, 1, 2**30)
    attention_bias: bool = flag(False)
    num_experts: int = whole(128, 0, MOST_EXPERTS, names=("num_experts", "num_local_experts"))
    num_experts_per_tok: int = whole(8, 1, MOST_EXPERTS)
    moe_intermediate_size: int = whole(768, 1, 2**20)
    # What files of Qwen3-Coder say besides, of what the class always or never has.
    use_qk_norm: bool = _only(True)
    qkv_bias: bool = _only(False)

    def check(self) -> None:
        """Check that the layers' types, where given, say the same as the window."""
        super().check()
        check_uniform_layers(self, self.layer_types, self.own_window)

    def window(self, layer: int) -> int | None:
        """Return how many latest tokens a token sees, itself included; None: all."""
        return self.own_window


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `qwen3-moe`."""
    return [
        ModelPlugin(
            name="qwen3-moe",
            load="quire_models.qwen3_moe.model:Qwen3Moe",
            architectures=("Qwen3MoeForCausalLM",),
            config_class=Qwen3MoeConfig,
            summary="Qwen3 with experts",
        )
    ]
