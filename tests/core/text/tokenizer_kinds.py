"""Tokenizers of every kind, trained here on a small text: no download, no files of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It doesn't care, does it?",
    "A small coffee, please: two sugars and milk! That's 3.50 or 12 for four.",
    "Größe, café, naïve; 你好世界, привет мир, こんにちは, 🙂👍🏽 and 🇩🇪.",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 22))  # the sum\n",
    "hello world hello there the the coffee coffee orders order ordering ordered",
] * 4
WORD_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

KINDS = (
    "gpt2",
    "llama3",
    "qwen2",
    "llama2",
    "llama2_legacy",
    "mistral",
    "gemma",
    "unigram",
    "unigram_cleaned",
    "wordpiece",
    "words",
)


def train(backend: Backend, trainer: Any) -> Backend:
    backend.train_from_iterator(CORPUS, trainer=trainer)
    return backend


def with_begin(token: str, token_id: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def build_byte_level(specials: list[str], size: int, pre_tokenizer: Any) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    return train(backend, trainer)


def build_gpt2() -> tuple[Backend, dict[str, Any]]:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = build_byte_level(["<|endoftext|>"], 400, pre)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}


def build_llama3() -> tuple[Backend, dict[str, Any]]:
    split = pre_tokenizers.Split(Regex(WORD_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre = pre_tokenizers.Sequence([split, byte_level])
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    backend = build_byte_level(specials, 420, pre)
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), with_begin("<|begin_of_text|>", 0)]
    )
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return backend, {**config, "clean_up_tokenization_spaces": True}


def build_qwen2() -> tuple[Backend, dict[str, Any]]:
    backend, _ = build_llama3()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    return backend, config


def build_byte_fallback(*, prefix: bool) -> Backend:
    """Return a SentencePiece-like BPE: pieces with ▁, and 256 byte tokens."""
    backend = Backend(models.BPE())
    scheme = "always" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False, limit_alphabet=70)
    trained = json.loads(train(backend, trainer).to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in trained["vocab"] if token not in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in trained["merges"]]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = with_begin("<s>", 1)
    return backend


def build_llama2() -> tuple[Backend, dict[str, Any]]:
    backend = build_byte_fallback(prefix=True)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = {
        key: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": False}
        for key, token in named.items()
    }
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_eos_token": True}
    return backend, {**config, **wrapped}


def build_llama2_legacy() -> tuple[Backend, dict[str, Any]]:
    backend, config = build_llama2()
    return backend, {**config, "tokenizer_class": "LlamaTokenizerFast", "legacy": True}


def build_mistral() -> tuple[Backend, dict[str, Any]]:
    backend = build_byte_fallback(prefix=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    return backend, config


def build_gemma() -> tuple[Backend, dict[str, Any]]:
    backend = build_byte_fallback(prefix=False)
    backend.normalizer = normalizers.Replace(" ", "▁")
    return backend, {"bos_token": "<s>", "eos_token": "</s>"}


def build_unigram() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    train(backend, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return backend, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def build_unigram_cleaned() -> tuple[Backend, dict[str, Any]]:
    backend, config = build_unigram()
    return backend, {**config, "clean_up_tokenization_spaces": True}


def build_wordpiece() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=250, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    train(backend, trainer)
    backend.post_processor = with_begin("[CLS]", 1)
    return backend, {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}


def build_words() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=80, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    return train(backend, trainer), {"bos_token": "<s>", "unk_token": "<unk>"}


BUILDERS: dict[str, Callable[[], tuple[Backend, dict[str, Any]]]] = {
    kind: globals()[f"build_{kind}"] for kind in KINDS
}
MODEL_TYPES = {"qwen2": "qwen2", "mistral": "mistral"}


def write_tokenizer(folder: Path, kind: str) -> Path:
    """Write a checkpoint folder of one kind, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    backend, config = BUILDERS[kind]()
    backend.save(str(folder / "tokenizer.json"))
    if "tokenizer_class" not in config:
        config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"model_type": MODEL_TYPES.get(kind, "llama"), "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(model))
    return folder
