"""Run a model plugin without an engine: real layers, dense attention, weights of the real class."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, LatentOptions, Model
from quire.interfaces.model_config import ModelConfig
from quire.interfaces.plugin import ModelPlugin
from quire.layers.attention import Attention
from quire.layers.build import LayerBuilder
from quire.layers.latent_attention import LatentAttention
from quire.layers.places import places
from quire_models import (
    deepseek,
    gpt_oss,
    llama,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from quire_quant.none.method import NoQuantization

PLUGINS: dict[str, ModelPlugin] = {
    architecture: plugin
    for family in (
        deepseek,
        gpt_oss,
        llama,
        mixtral,
        olmo2,
        phi3,
        qwen2,
        qwen2_moe,
        qwen3,
        qwen3_moe,
    )
    for plugin in family.quire_models()
    for architecture in plugin.architectures
}


class DenseAttention(Attention):
    """Attention over the step's own tokens, with a mask written out."""

    def forward(self, qkv: Tensor, batch: Batch) -> Tensor:
        """Return [num_tokens, num_heads * head_dim] for whole sequences."""
        heads = qkv.view(len(qkv), -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
        if self.options.qk_norm is not None:
            q = _normalised(q, self.q_norm.weight, self.options.qk_norm)
            k = _normalised(k, self.k_norm.weight, self.options.qk_norm)
        turned = self.options.rotary.rotate(torch.cat((q, k), 1), batch.positions)
        q, k = turned.split((self.num_heads, self.num_kv_heads), 1)
        repeats = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.options.scale
        scores = scores.masked_fill(~_visible(batch, self.options.sliding_window), -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : len(k)]
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


class DenseLatent(LatentAttention):
    """The plain form over the step's own tokens, with keys and values written out."""

    def forward(self, q: Tensor, kv: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return [num_tokens, num_heads * v_head_dim] for whole sequences."""
        sizes, rotate = self.latent, self.options.rotary.rotate
        nope, turned = q.unflatten(1, (self.num_heads, -1)).split(
            (sizes.nope_head_dim, sizes.rope_head_dim), -1
        )
        latent, key = kv.split((sizes.kv_lora_rank, sizes.rope_head_dim), -1)
        latent = _normalised(latent, self.kv_a_layernorm.weight, self.norm_eps)
        made = functional.linear(latent, self.kv_b_proj.weight).unflatten(1, (self.num_heads, -1))
        keys, values = made.split((sizes.nope_head_dim, sizes.v_head_dim), -1)
        scores = torch.einsum("qhd,khd->hqk", nope, keys)
        turned, key = rotate(turned, batch.positions), rotate(key[:, None], batch.positions)
        scores = scores + torch.einsum("qhd,kd->hqk", turned, key[:, 0])
        scores = (scores * self.options.scale).masked_fill(~_visible(batch, None), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)


def _visible(batch: Batch, window: int | None) -> Tensor:
    sequences = torch.repeat_interleave(torch.tensor(batch.query_lens))
    distance = batch.positions[:, None] - batch.positions[None, :]
    same = sequences[:, None] == sequences[None, :]
    return same & (distance >= 0) & (distance < (window or len(distance) + 1))


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


class DenseBuilder(LayerBuilder):
    """The engine's builder, but for attention."""

    def attention(self, name: str, options: AttentionOptions) -> nn.Module:
        """Make dense attention."""
        return DenseAttention(options, self.dtype, self.device)

    def latent_attention(self, name: str, options: LatentOptions) -> nn.Module:
        """Make latent attention in the plain form."""
        return DenseLatent(options, self.dtype, self.device)


def read_config(architecture: str, given: Any) -> ModelConfig:
    """Read a config.json by the class that claims the architecture."""
    return PLUGINS[architecture].config_class.from_json(given)


def build(architecture: str, config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> Model:
    """Build a model whose weights are not filled yet."""
    builder = DenseBuilder(
        dtype=dtype,
        device=torch.device("cpu"),
        max_model_len=config.longest_model_len,
        quantization=NoQuantization({}),
        dense=NoQuantization({}),
    )
    model_class = PLUGINS[architecture].load_class()
    model: Model = model_class(config, builder)
    return model


def copy_weights(model: Model, oracle: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Fill the model by checkpoint names; return names that are missing and left over."""
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        given = load_file(Path(folder) / "model.safetensors")
    wanted = places(model)
    for name in set(given) & set(wanted):
        wanted[name].view().copy_(given[name])
    return set(wanted) - set(given), set(given) - set(wanted)


def batch_of(sequences: list[list[int]]) -> Batch:
    """Return a batch of whole sequences, with what models and dense attention read."""
    lens = [len(sequence) for sequence in sequences]
    empty = torch.zeros(0, dtype=torch.int32)
    return Batch(
        token_ids=torch.tensor([t for sequence in sequences for t in sequence], dtype=torch.int32),
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lens]),
        cu_seqlens_q=empty,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        logit_rows=empty,
        rows=empty,
        groups=(),
        query_lens=lens,
        seq_lens_bound=lens,
        num_single_token_seqs=0,
        padded_to=len(lens),
    )


@torch.inference_mode()
def logits_of(model: Model, sequences: list[list[int]]) -> list[Tensor]:
    """Return the logits [length, vocab_size] of each sequence, computed in one batch."""
    batch = batch_of(sequences)
    logits = model.logits(model(model.embed(batch.token_ids), batch))
    return list(logits.split(batch.query_lens))
