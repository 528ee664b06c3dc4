"""Models `deepseek-v2` and `deepseek-v3`: latent attention, and experts in groups."""

from __future__ import annotations

import math
from typing import Any

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import end_tokens, flag, key, one_of, real, refuse, shown, whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.decoder_config import DecoderConfig
from quire_models.mixture_config import MOST_EXPERTS, check_top_k

QUIRE_API_VERSION = (1, 0)


def _only(value: Any) -> Any:
    """Declare a key of which the class honours one value; null: it is not said."""

    def check(given: Any) -> bool:
        return given is None or (type(given) is type(value) and given == value)

    return key(value, check=check, allowed=shown(value))


@frozen(kw_only=True)
class DeepseekConfig(DecoderConfig):
    """Keys that both classes have."""

    q_lora_rank: int | None = whole(1536, 1, 2**16, optional=True)
    kv_lora_rank: int = whole(512, 1, 2**15)
    qk_nope_head_dim: int = whole(128, 1, 4096)
    qk_rope_head_dim: int = whole(64, 2, 4096)
    v_head_dim: int = whole(128, 1, 4096)
    qk_head_dim: int | None = whole(None, 1, 8192, optional=True)
    attention_bias: bool = flag(False)
    n_routed_experts: int = whole(64, 1, MOST_EXPERTS)
    n_shared_experts: int | None = whole(2, 0, 1024, optional=True)
    moe_intermediate_size: int = whole(1407, 1, 2**20)
    num_experts_per_tok: int | None = whole(None, 1, MOST_EXPERTS, optional=True)
    first_k_dense_replace: int = whole(0, 0, 1024)
    routed_scaling_factor: float = real(1.0, 0.0, 1e6)
    n_group: int | None = whole(None, 1, MOST_EXPERTS, optional=True)
    topk_group: int | None = whole(None, 1, MOST_EXPERTS, optional=True)
    moe_layer_freq: int = _only(1)

    @property
    def head_dim(self) -> int:
        """Size of the part of a head that is rotated."""
        return self.qk_rope_head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of latents that one token adds to the KV cache, of all layers."""
        return self.num_hidden_layers * (self.kv_lora_rank + self.qk_rope_head_dim)

    @property
    def scale(self) -> float:
        """What multiplies scores. Source: Peng et al., "YaRN", 2023, 3.4."""
        plain = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        factor, mscale = self.rope.context_factor, self.rope.mscale_all_dim
        if not mscale or factor <= 1:
            return plain
        return plain * (0.1 * mscale * math.log(factor) + 1.0) ** 2

    @property
    def has_groups(self) -> bool:
        """Whether experts are chosen by groups."""
        return True

    def check(self) -> None:
        """Check that what is said twice is said alike, and that the groups hold the experts."""
        heads = self.num_attention_heads
        if self.num_kv_heads != heads:
            allowed = f"null, or num_attention_heads, {heads}"
            raise refuse(self.source, "num_key_value_heads", self.num_kv_heads, allowed)
        whole_head = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.qk_head_dim not in (None, whole_head):
            allowed = f"qk_nope_head_dim and qk_rope_head_dim together, {whole_head}"
            raise refuse(self.source, "qk_head_dim", self.qk_head_dim, allowed)
        if self.given_head_dim not in (None, self.qk_rope_head_dim):
            allowed = f"null, or qk_rope_head_dim, {self.qk_rope_head_dim}"
            raise refuse(self.source, "head_dim", self.given_head_dim, allowed)
        if self.qk_rope_head_dim % 2:
            raise refuse(self.source, "qk_rope_head_dim", self.qk_rope_head_dim, "even numbers")
        self.rope.check_head_dim(self.head_dim, self.source)
        if self.first_k_dense_replace < self.num_hidden_layers:
            self._check_experts()

    def _check_experts(self) -> None:
        top_k, experts = self.num_experts_per_tok, self.n_routed_experts
        if top_k is None:
            raise refuse(self.source, "num_experts_per_tok", None, f"whole numbers to {experts}")
        check_top_k(self, top_k, experts)
        if not self.has_groups:
            return
        if self.n_group is None or experts % self.n_group:
            divisors = f"divisors of n_routed_experts, {experts}"
            raise refuse(self.source, "n_group", self.n_group, divisors)
        size = experts // self.n_group
        fewest = -(-top_k // size)
        if self.topk_group is None or not fewest <= self.topk_group <= self.n_group:
            allowed = (
                f"whole numbers from {fewest}, whose groups of {size} hold num_experts_per_tok "
                f"experts, to n_group, {self.n_group}"
            )
            raise refuse(self.source, "topk_group", self.topk_group, allowed)

    def has_experts(self, layer: int) -> bool:
        """Answer whether the layer has experts."""
        return layer >= self.first_k_dense_replace


@frozen(kw_only=True)
class DeepseekV2Config(DeepseekConfig):
    """Keys of DeepseekV2ForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(102400, 1, 2**24)
    eos_token_ids: tuple[int, ...] = end_tokens(2)
    mlp_bias: bool = flag(False)
    topk_method: str | None = one_of("greedy", ("greedy", "group_limited_greedy"))
    scoring_func: str | None = one_of("softmax", ("softmax", None))
    # The class never normalises, whatever is said.
    norm_topk_prob: bool = _only(False)

    @property
    def has_groups(self) -> bool:
        """Whether experts are chosen by groups."""
        return self.topk_method == "group_limited_greedy"


@frozen(kw_only=True)
class DeepseekV3Config(DeepseekConfig):
    """Keys of DeepseekV3ForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(129280, 1, 2**24)
    hidden_size: int = whole(7168, 1, 2**17)
    intermediate_size: int = whole(18432, 1, 2**20)
    num_hidden_layers: int = whole(61, 1, 1024)
    num_attention_heads: int = whole(128, 1, 1024)
    max_position_embeddings: int = whole(4096, 1, 2**30)
    eos_token_ids: tuple[int, ...] = end_tokens(1)
    n_routed_experts: int = whole(256, 1, MOST_EXPERTS)
    n_shared_experts: int | None = whole(1, 0, 1024, optional=True)
    moe_intermediate_size: int = whole(2048, 1, 2**20)
    num_experts_per_tok: int | None = whole(8, 1, MOST_EXPERTS, optional=True)
    first_k_dense_replace: int = whole(3, 0, 1024)
    routed_scaling_factor: float = real(2.5, 0.0, 1e6)
    n_group: int | None = whole(8, 1, MOST_EXPERTS, optional=True)
    topk_group: int | None = whole(4, 1, MOST_EXPERTS, optional=True)
    norm_topk_prob: bool = flag(True)
    rope_interleave: bool = flag(True)
    # Modules behind the last layer that predict further tokens; they are not loaded.
    num_nextn_predict_layers: int | None = whole(
        1, 0, 1024, optional=True, names=("num_nextn_predict_layers", "num_mtp_layers")
    )
    topk_method: str | None = one_of("noaux_tc", ("noaux_tc", None))
    scoring_func: str | None = one_of("sigmoid", ("sigmoid", None))

    def _check_experts(self) -> None:
        super()._check_experts()
        assert self.n_group is not None, "it was checked"
        if self.n_routed_experts // self.n_group < 2:
            allowed = "numbers of groups of two experts or more"
            raise refuse(self.source, "n_group", self.n_group, allowed)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `deepseek-v2` and `deepseek-v3`."""
    return [
        ModelPlugin(
            name="deepseek-v2",
            load="quire_models.deepseek.model:DeepseekV2",
            architectures=("DeepseekV2ForCausalLM",),
            config_class=DeepseekV2Config,
            summary="DeepSeek-V2 and V2-Lite: latent attention, and experts",
        ),
        ModelPlugin(
            name="deepseek-v3",
            load="quire_models.deepseek.model:DeepseekV3",
            architectures=("DeepseekV3ForCausalLM",),
            config_class=DeepseekV3Config,
            summary="DeepSeek-V3 and R1: latent attention, and experts in groups",
        ),
    ]
