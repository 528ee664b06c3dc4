"""Tiny random encoders and decoders of Transformers' classes as folders, and what they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = 60
CLS, SEP = 2, 3
SIZES: dict[str, Any] = {
    "vocab_size": WORDS + 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1},
    "XLMRoberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "MPNet": {"pad_token_id": 1},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
}
OPTIONS: dict[str, Any] = {"num_threads": 1}


def write_tokenizer(folder: Path) -> None:
    """Write one that reads `w0` to `w59`, with [CLS] and [SEP] around a text or a pair."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def write_model(folder: Path, name: str, **keys: Any) -> Any:
    """Write the class `name` of Transformers with random weights, and return it."""
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**SIZES, **keys})
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        # So far from each other that the vectors of two inputs are.
        parameter.data.normal_(1.0 if is_norm else 0.0, 0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_modules(folder: Path, pooling: dict[str, Any], *, normalize: bool = True) -> None:
    """Write modules.json, as Sentence-Transformers does, with a Pooling of these keys."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    given = {"word_embedding_dimension": SIZES["hidden_size"], **pooling}
    (folder / "1_Pooling/config.json").write_text(json.dumps(given))


def ragged(seed: int = 0) -> list[list[int]]:
    """Return token ids of sequences of very different lengths, one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (1, 58, 7, 7, 1, 20)
    drawn = [torch.randint(4, WORDS + 4, (n,), generator=generator).tolist() for n in lengths]
    return [[CLS], *([CLS, *ids, SEP] for ids in drawn)]


@torch.no_grad()
def hidden_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the real class's last hidden states [tokens, hidden_size] of one sequence."""
    found: torch.Tensor = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return found


def pooled(kind: str, hidden: torch.Tensor) -> torch.Tensor:
    """Return the vector of one sequence, by the definitions of Sentence-Transformers."""
    count = len(hidden)
    ranks = torch.arange(1, count + 1)[:, None]
    return {
        "cls": hidden[0],
        "max": hidden.max(0).values,
        "mean": hidden.mean(0),
        "mean_sqrt_len": hidden.sum(0) / count**0.5,
        "weightedmean": (hidden * ranks).sum(0) / ranks.sum(),
        "lasttoken": hidden[-1],
    }[kind]


def cosine(one: Any, other: Any) -> float:
    """Return the cosine of two vectors."""
    pair = [torch.tensor(list(x), dtype=torch.float64) for x in (one, other)]
    return float(torch.cosine_similarity(*pair, dim=0))
