"""The keys of config.json that the model honours. Imports no torch."""

from __future__ import annotations

from attrs import frozen

from quire.interfaces.model_config import ModelConfig, real, refuse, whole
from quire.interfaces.rope import RopeParameters, rope_key


@frozen(kw_only=True)
class ExampleConfig(ModelConfig):
    """Keys of ExampleForCausalLM; vocab_size, hidden_size and the like are in every config."""

    num_attention_heads: int = whole(8, 1, 1024)
    num_kv_heads: int = whole(2, 1, 1024, names=("num_key_value_heads",))
    intermediate_size: int = whole(1024, 1, 2**20)
    rms_norm_eps: float = real(1e-6, 0.0, 1.0)
    rope: RopeParameters = rope_key()

    def check(self) -> None:
        """Check that heads divide what they share."""
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            divisors = f"divisors of hidden_size, {self.hidden_size}"
            raise refuse(self.source, "num_attention_heads", heads, divisors)
        if heads % self.num_kv_heads:
            divisors = f"divisors of num_attention_heads, {heads}"
            raise refuse(self.source, "num_key_value_heads", self.num_kv_heads, divisors)
        self.rope.check_head_dim(self.head_dim, self.source)

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the KV cache, of all layers."""
        return 2 * self.num_hidden_layers * self.num_kv_heads * self.head_dim
