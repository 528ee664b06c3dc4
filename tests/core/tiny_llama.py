"""A random Llama of a few thousand parameters as a folder, and engines on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quire.config import EngineConfig
from quire.engine import Engine
from quire.frontend import Frontend
from quire.request import Request, SamplingParams, SequenceUpdate

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
    "dtype": "float32",
}
OPTIONS: dict[str, Any] = {
    "attention_backend": "sdpa",  # `auto` depends on what is built
    "skip_tokenizer_init": True,
    "num_threads": 1,
    "block_size": 4,
    "kv_cache_memory_bytes": 4 << 20,
    "max_num_seqs": 8,
}


def write_folder(folder: Path, *, seed: int = 0, **keys: Any) -> Path:
    """Write config.json and weights so large that greedy tokens wander."""
    config = {**CONFIG, **keys}
    (folder / "config.json").write_text(json.dumps(config))
    hidden, size = config["hidden_size"], config["intermediate_size"]
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 3 / shape[-1] ** 0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator),
        "lm_head.weight": draw(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        for part, rows in (("q", hidden), ("k", kv_size), ("v", kv_size), ("o", hidden)):
            tensors[f"{name}.self_attn.{part}_proj.weight"] = draw(rows, hidden)
            if config["architectures"] == ["Qwen2ForCausalLM"] and part != "o":
                tensors[f"{name}.self_attn.{part}_proj.bias"] = torch.zeros(rows)
        for part in ("gate", "up"):
            tensors[f"{name}.mlp.{part}_proj.weight"] = draw(size, hidden)
        tensors[f"{name}.mlp.down_proj.weight"] = draw(hidden, size)
        for norm in ("input", "post_attention"):
            tensors[f"{name}.{norm}_layernorm.weight"] = torch.ones(hidden)
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_engine(folder: Path, **options: Any) -> Engine:
    """Start an engine on the folder."""
    given = {"model": str(folder), **OPTIONS, **options}
    return Engine(Frontend(EngineConfig.from_options(given)).prepared)


def prompt(number: int, length: int) -> list[int]:
    """Return a prompt of its own for each number."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(0, CONFIG["vocab_size"], (length,), generator=generator).tolist()


def request(
    number: int, token_ids: Sequence[int], *, max_tokens: int = 12, **params: Any
) -> Request:
    """Return a greedy request unless the parameters say otherwise."""
    values = {"temperature": 0.0, "max_tokens": max_tokens, **params}
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=tuple(token_ids),
        params=SamplingParams(**values),
        max_tokens=max_tokens,
        seed=values.get("seed") or number,
    )


def run_all(
    engine: Engine, requests: Sequence[Request]
) -> tuple[dict[tuple[str, int], list[int]], list[SequenceUpdate]]:
    """Run requests to their ends; return the tokens of each sequence, and all updates."""
    for one in requests:
        engine.add_request(one)
    tokens: dict[tuple[str, int], list[int]] = {}
    updates: list[SequenceUpdate] = []
    while engine.has_unfinished():
        for update in engine.step():
            updates.append(update)
            tokens.setdefault((update.request_id, update.index), []).extend(update.token_ids)
    return tokens, updates


def has_all_blocks(engine: Engine) -> bool:
    """Answer whether no sequence holds a block; cached ones count as free."""
    return engine.block_manager.num_free_blocks == engine.layout.kv_size.num_blocks - 1


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of one token a byte, ids 0 to 255, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
