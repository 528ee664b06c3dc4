"""Models `falcon` and `bloom`: attention with a fused projection, ALiBi or RoPE, LayerNorm."""

import math

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import (
    ModelConfig,
    end_tokens,
    flag,
    one_of,
    real,
    refuse,
    whole,
)
from quire.interfaces.plugin import ModelPlugin
from quire.interfaces.rope import RopeParameters, rope_key

QUIRE_API_VERSION = (1, 0)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Return what a key's distance costs in each head.

    Source: Press et al., "Train short, test long", 2021, for numbers of heads of any kind.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    base, between = 2 ** (-8 / power), 2 ** (-4 / power)
    found = [base**n for n in range(1, power + 1)]
    return (*found, *(between**n for n in range(1, 2 * (num_heads - power), 2)))


@frozen(kw_only=True)
class FusedConfig(ModelConfig):
    """Keys and properties that Falcon and BLOOM share."""

    hidden_size: int = whole(4544, 1, 2**17, names=("hidden_size", "n_embed"))
    num_attention_heads: int = whole(71, 1, 1024)
    layer_norm_epsilon: float = real(1e-5, 0.0, 1.0)
    tie_word_embeddings: bool = flag(True)

    def check(self) -> None:
        """Check that heads divide the hidden size."""
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            divisors = f"divisors of hidden_size, {self.hidden_size}"
            raise refuse(self.source, "num_attention_heads", heads, divisors)

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_attention_heads

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the KV cache, of all layers."""
        return 2 * self.num_hidden_layers * self.num_kv_heads * self.head_dim


@frozen(kw_only=True)
class FalconConfig(FusedConfig):
    """Keys of FalconForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(65024, 1, 2**24)
    given_num_kv_heads: int | None = whole(None, 1, 1024, optional=True, names=("num_kv_heads",))
    given_intermediate_size: int | None = whole(
        None, 1, 2**20, optional=True, names=("ffn_hidden_size",)
    )
    eos_token_ids: tuple[int, ...] = end_tokens(11)
    alibi: bool = flag(False)
    new_decoder_architecture: bool = flag(False)
    multi_query: bool = flag(True)
    parallel_attn: bool = flag(True)
    bias: bool = flag(False)
    num_ln_in_parallel_attn: int | None = whole(None, 1, 2, optional=True)
    activation: str = one_of("gelu", ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"))
    rope: RopeParameters = rope_key()  # noqa: RUF009 - an attrs field

    def check(self) -> None:
        """Check what the kinds of blocks say together."""
        super().check()
        heads = self.num_attention_heads
        if heads % self.num_kv_heads:
            divisors = f"divisors of num_attention_heads, {heads}"
            raise refuse(self.source, "num_kv_heads", self.num_kv_heads, divisors)
        if self.new_decoder_architecture and not self.parallel_attn:
            allowed = "true with new_decoder_architecture"
            raise refuse(self.source, "parallel_attn", self.parallel_attn, allowed)
        if self.num_ln_in_parallel_attn == 2 and not self.new_decoder_architecture:
            allowed = "1 or null without new_decoder_architecture"
            raise refuse(self.source, "num_ln_in_parallel_attn", 2, allowed)
        if not self.alibi:
            self.rope.check_head_dim(self.head_dim, self.source)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        if self.new_decoder_architecture:
            return self.given_num_kv_heads or self.num_attention_heads
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Size between the projections of an MLP."""
        return self.given_intermediate_size or 4 * self.hidden_size

    @property
    def norm_names(self) -> tuple[str, ...]:
        """The norms of a block: before attention, and before the MLP where it has its own."""
        if not self.parallel_attn:
            return ("input_layernorm", "post_attention_layernorm")
        if self.new_decoder_architecture and self.num_ln_in_parallel_attn != 1:
            return ("ln_attn", "ln_mlp")
        return ("input_layernorm",)


@frozen(kw_only=True)
class BloomConfig(FusedConfig):
    """Keys of BloomForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(250880, 1, 2**24)
    hidden_size: int = whole(64, 1, 2**17, names=("hidden_size", "n_embed"))
    num_hidden_layers: int = whole(2, 1, 1024, names=("n_layer", "num_hidden_layers"))
    num_attention_heads: int = whole(8, 1, 1024, names=("n_head", "num_attention_heads"))
    max_position_embeddings: int = whole(
        2048, 1, 2**30, names=("seq_length", "max_position_embeddings")
    )
    eos_token_ids: tuple[int, ...] = end_tokens(2)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `falcon` and `bloom`."""
    return [
        ModelPlugin(
            name="falcon",
            load="quire_models.falcon.model:Falcon",
            architectures=("FalconForCausalLM",),
            config_class=FalconConfig,
            summary="Falcon: attention and MLP side by side, RoPE or ALiBi",
        ),
        ModelPlugin(
            name="bloom",
            load="quire_models.falcon.model:Bloom",
            architectures=("BloomForCausalLM",),
            config_class=BloomConfig,
            summary="BLOOM: ALiBi, a norm behind the embedding",
        ),
    ]
