"""config.json keys that encoders of BERT's kind share. Never imports torch."""

from __future__ import annotations

from attrs import frozen

from quire.interfaces.model_config import ModelConfig, flag, one_of, real, refuse, whole

ACTIVATIONS = ("gelu", "relu", "silu", "swish", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@frozen(kw_only=True)
class EncoderConfig(ModelConfig):
    """Keys of an encoder with learned positions, LayerNorm after each part, and a plain MLP.

    `first_position` is the row of the table that the first token has.
    """

    vocab_size: int = whole(30522, 1, 2**24)
    hidden_size: int = whole(768, 1, 2**17)
    num_hidden_layers: int = whole(12, 1, 1024)
    num_attention_heads: int = whole(12, 1, 1024)
    intermediate_size: int = whole(3072, 1, 2**20)
    hidden_act: str = one_of("gelu", ACTIVATIONS)
    layer_norm_eps: float = real(1e-12, 0.0, 1.0)
    max_position_embeddings: int = whole(512, 1, 2**30)
    type_vocab_size: int = whole(2, 1, 2**16)
    position_embedding_type: str | None = one_of("absolute", ("absolute", None))
    is_decoder: bool = flag(False)
    tie_word_embeddings: bool = flag(True)

    def check(self) -> None:
        """Check that heads divide the hidden size and that positions are left."""
        if self.hidden_size % self.num_attention_heads:
            divisors = f"divisors of hidden_size, {self.hidden_size}"
            raise refuse(self.source, "num_attention_heads", self.num_attention_heads, divisors)
        if self.is_decoder:
            raise refuse(self.source, "is_decoder", True, "false: it is served as an encoder")
        if self.max_model_len < 1:
            low = f"whole numbers above {self.first_position}"
            raise refuse(self.source, "max_position_embeddings", self.max_position_embeddings, low)

    @property
    def first_position(self) -> int:
        """Row of the table of positions that the first token has."""
        return 0

    @property
    def max_model_len(self) -> int:
        """Tokens that there are positions for."""
        return self.max_position_embeddings - self.first_position

    @property
    def kv_elements_per_token(self) -> int:
        """Nothing is kept."""
        return 0
