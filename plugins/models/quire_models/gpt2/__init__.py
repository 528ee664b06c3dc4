"""Model `gpt2`: GPT-2 and what is shaped like it."""

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

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class GPT2Config(ModelConfig):
    """Keys of GPT2LMHeadModel, with the defaults of Transformers."""

    vocab_size: int = whole(50257, 1, 2**24)
    hidden_size: int = whole(768, 1, 2**17, names=("n_embd", "hidden_size"))
    num_hidden_layers: int = whole(12, 1, 1024, names=("n_layer", "num_hidden_layers"))
    num_attention_heads: int = whole(12, 1, 1024, names=("n_head", "num_attention_heads"))
    max_position_embeddings: int = whole(
        1024, 1, 2**30, names=("n_positions", "max_position_embeddings", "n_ctx")
    )
    given_intermediate_size: int | None = whole(None, 1, 2**20, optional=True, names=("n_inner",))
    tie_word_embeddings: bool = flag(True)
    eos_token_ids: tuple[int, ...] = end_tokens(50256)
    activation_function: str = one_of(
        "gelu_new", ("gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "relu")
    )
    layer_norm_epsilon: float = real(1e-5, 0.0, 1.0)
    scale_attn_weights: bool = flag(True)
    scale_attn_by_inverse_layer_idx: bool = flag(False)

    def check(self) -> None:
        """Check that heads divide the hidden size."""
        if self.hidden_size % self.num_attention_heads:
            divisors = f"divisors of n_embd, {self.hidden_size}"
            raise refuse(self.source, "n_head", self.num_attention_heads, divisors)

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Size between the projections of an MLP."""
        return self.given_intermediate_size or 4 * self.hidden_size

    def scale(self, layer: int) -> float:
        """Return what scores are multiplied by in a layer."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the KV cache, of all layers."""
        return 2 * self.num_hidden_layers * self.hidden_size


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `gpt2`."""
    return [
        ModelPlugin(
            name="gpt2",
            load="quire_models.gpt2.model:GPT2",
            architectures=("GPT2LMHeadModel",),
            config_class=GPT2Config,
            summary="GPT-2",
        )
    ]
