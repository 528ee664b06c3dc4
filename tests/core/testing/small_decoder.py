"""A right model of Llama's maths, cut into methods that a broken one may replace."""

from __future__ import annotations

from typing import Any, ClassVar

from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire.interfaces.model_config import ModelConfig, flag, real, whole
from quire.interfaces.rope import RopeParameters, rope_key
from quire.layers.rotary import RotaryTable


@frozen(kw_only=True)
class SmallConfig(ModelConfig):
    """Keys of LlamaForCausalLM that the model honours."""

    num_attention_heads: int = whole(4, 1, 64)
    num_key_value_heads: int = whole(2, 1, 64)
    intermediate_size: int = whole(64, 1, 4096)
    rms_norm_eps: float = real(1e-6, 0.0, 1.0)
    attention_bias: bool = flag(False)
    rope: RopeParameters = rope_key()  # noqa: RUF009 - an attrs field

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed.to(x.dtype) * weight


class SmallLayer(nn.Module):
    """One decoder layer; `owner` says how its parts are computed."""

    def __init__(self, owner: SmallDecoder, index: int, build: BuildContext) -> None:
        super().__init__()
        config, name = owner.config, owner.name_of_layer(index)
        hidden, head_dim = config.hidden_size, config.head_dim
        kv_size = config.num_key_value_heads * head_dim
        self.input_layernorm = Norm(hidden, build)
        self.post_attention_layernorm = Norm(hidden, build)
        self.qkv = build.linear(
            f"{name}.self_attn.qkv_proj",
            hidden,
            (hidden, kv_size, kv_size),
            bias=config.attention_bias,
            parts=("q_proj", "k_proj", "v_proj"),
        )
        options = owner.attention_options(index, config)
        self.attention = build.attention(f"{name}.self_attn.attn", options)
        self.o_proj = build.linear(
            f"{name}.self_attn.o_proj", hidden, hidden, bias=config.attention_bias
        )
        size = config.intermediate_size
        self.gate_up = build.linear(
            f"{name}.mlp.gate_up_proj", hidden, (size, size), parts=owner.mlp_parts
        )
        self.down_proj = build.linear(f"{name}.mlp.down_proj", size, hidden)


class Norm(nn.Module):
    def __init__(self, size: int, build: BuildContext) -> None:
        super().__init__()
        self.weight = build.parameter(size)


class Stack(nn.Module):
    """What checkpoints call `model`."""

    def __init__(self, owner: SmallDecoder, build: BuildContext) -> None:
        super().__init__()
        config = owner.config
        self.embed = build.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(SmallLayer(owner, index, build) for index in layers)
        self.norm = Norm(config.hidden_size, build)


class SmallDecoder(Model):
    """Llama, written out."""

    mlp_parts: ClassVar[tuple[str, str]] = ("gate_proj", "up_proj")
    weight_names: ClassVar[WeightNames] = WeightNames(ignored=(r".*\.inv_freq",))
    config: Any

    def __init__(self, config: SmallConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.rotary = RotaryTable.from_parameters(
            self.rope(config),
            config.head_dim,
            max_len=build.max_model_len,
            dtype=build.dtype,
            device=build.device,
        )
        self.model = Stack(self, build)
        tied = self.model.embed if self.ties_head(config) else None
        self.head = build.head("lm_head", config.hidden_size, config.vocab_size, tied_to=tied)

    def rope(self, config: SmallConfig) -> RopeParameters:
        return config.rope

    def ties_head(self, config: SmallConfig) -> bool:
        return config.tie_word_embeddings

    def name_of_layer(self, index: int) -> str:
        return f"model.layers.{index}"

    def scale(self, config: SmallConfig) -> float:
        return config.head_dim**-0.5

    def attention_options(self, index: int, config: SmallConfig) -> AttentionOptions:
        return AttentionOptions(
            layer_index=index,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=self.scale(config),
            rotary=self.rotary,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.embed(token_ids)

    def normed(self, x: Tensor, norm: Norm, where: str) -> Tensor:
        return rms_norm(x, norm.weight, self.config.rms_norm_eps)

    def attended(self, layer: SmallLayer, x: Tensor, batch: Batch) -> Tensor:
        return layer.o_proj(layer.attention(layer.qkv(x), batch))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        for layer in self.model.layers:
            normed = self.normed(hidden, layer.input_layernorm, "attention")
            hidden = hidden + self.attended(layer, normed, batch)
            normed = self.normed(hidden, layer.post_attention_layernorm, "mlp")
            gate, up = layer.gate_up(normed).chunk(2, -1)
            hidden = hidden + layer.down_proj(self.gated(gate, up))
        return self.normed(hidden, self.model.norm, "final")

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
