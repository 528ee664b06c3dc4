"""Build the model that is trained, measure it, and write its checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from quire_models.demo.batches import Batch
from quire_models.demo.recipe import CONTEXT_LENGTH, VOCABULARY_SIZE, Recipe
from quire_models.demo.tokenizer import write_json

END_OF_TEXT_ID, TURN_END_ID = 0, 2


def build_model(recipe: Recipe, device: torch.device) -> Qwen3ForCausalLM:
    """Build a Qwen3 with tied embeddings and random weights that depend on the seed alone."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=TURN_END_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    model: Any = Qwen3ForCausalLM(config)
    return model.to(device)


@torch.no_grad()
def build_draft(recipe: Recipe, teacher: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Build a draft whose embeddings are the principal components of the teacher's."""
    draft = build_model(recipe, teacher.device)
    embeddings = teacher.model.embed_tokens.weight
    directions, sizes, _ = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)
    components = directions[:, : recipe.hidden_size] * sizes[: recipe.hidden_size]
    draft.model.embed_tokens.weight.copy_(components * (0.03 / components.std()))
    return draft


def add_dropout(model: Qwen3ForCausalLM, probability: float) -> None:
    """Drop from the embeddings and from what each block adds; Qwen3 has no such dropout."""

    def drop(module: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, probability, training=module.training)

    blocks = [
        block
        for layer in model.model.layers
        for block in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    for module in (model.model.embed_tokens, *blocks):
        module.register_forward_hook(drop)


def predict(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Compute the float32 logits `[num_predicted, vocabulary]` of the batch's targets."""
    hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.places]).float()


@torch.no_grad()
def assistant_loss(model: Qwen3ForCausalLM, batches: Iterable[Batch]) -> float:
    """Give the mean negative log-likelihood, in nats, of the tokens that the assistant says."""
    total, count = 0.0, 0
    model.eval()
    for batch in batches:
        total += F.cross_entropy(predict(model, batch), batch.targets, reduction="sum").item()
        count += len(batch.targets)
    return total / count


def load_checkpoint(folder: Path, device: torch.device) -> Qwen3ForCausalLM:
    """Load a checkpoint's bfloat16 weights to compute in float32, without dropout."""
    model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()


def save_checkpoint(model: Any, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    generation = {
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": [TURN_END_ID, END_OF_TEXT_ID],
        "pad_token_id": END_OF_TEXT_ID,
        "do_sample": True,
        "temperature": 0.4,
        "top_p": 0.9,
    }
    write_json(folder / "generation_config.json", generation)
