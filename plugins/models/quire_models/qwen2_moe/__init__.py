"""Model `qwen2-moe`: Qwen1.5-MoE and Qwen2 with experts."""

from __future__ import annotations

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import flag, whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.mixture_config import SparseConfig

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class Qwen2MoeConfig(SparseConfig):
    """Keys of Qwen2MoeForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(151936, 1, 2**24)
    hidden_size: int = whole(2048, 1, 2**17)
    intermediate_size: int = whole(5632, 1, 2**20)
    num_hidden_layers: int = whole(24, 1, 1024)
    num_attention_heads: int = whole(16, 1, 1024)
    given_num_kv_heads: int | None = whole(
        16, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    max_position_embeddings: int = whole(32768, 1, 2**30)
    # Transformers writes 0 where there is none.
    sliding_window: int | None = whole(4096, 0, 2**30, optional=True)
    shared_expert_intermediate_size: int = whole(5632, 1, 2**20)
    qkv_bias: bool = flag(True)

    def window(self, layer: int) -> int | None:
        """Return how many latest tokens a token sees in a layer, itself included; None: all.

        Without `layer_types` every second layer below `max_window_layers` has the window.
        """
        if self.layer_types is not None:
            return super().window(layer)
        return self.own_window if layer % 2 == 0 and layer < self.max_window_layers else None


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `qwen2-moe`."""
    return [
        ModelPlugin(
            name="qwen2-moe",
            load="quire_models.qwen2_moe.model:Qwen2Moe",
            architectures=("Qwen2MoeForCausalLM",),
            config_class=Qwen2MoeConfig,
            summary="Qwen1.5-MoE and Qwen2 with experts",
        )
    ]
