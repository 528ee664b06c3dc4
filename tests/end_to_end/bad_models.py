"""Damaged models and bad options: what is done to a good folder, and what the error must name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import frozen

Damage = Callable[[Path], None]


@frozen
class Case:
    """`words` must all be in the one line on standard error."""

    words: tuple[str, ...]
    damage: Damage = lambda folder: None
    options: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ("-p", "hi")
    seconds: float = 2.0


def config(**keys: Any) -> Damage:
    """Change keys of config.json; None stands for JSON's null, ... takes a key away."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        found = json.loads(file.read_text()) | keys
        file.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))

    return damage


def file(name: str, content: str | bytes | None) -> Damage:
    """Replace a file, or take it away."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def weights(change: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of model.safetensors."""

    def damage(folder: Path) -> None:
        found = folder / "model.safetensors"
        found.write_bytes(change(found.read_bytes()))

    return damage


def both(*damages: Damage) -> Damage:
    """Do several."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def template(text: str) -> Damage:
    """Give the folder another chat template."""
    return file("tokenizer_config.json", json.dumps({"chat_template": text}))


def index(shard: str) -> Damage:
    """Put an index that names one shard beside the weights."""
    return file("model.safetensors.index.json", json.dumps({"weight_map": {"a": shard}}))


class Evil:
    """Write a file when unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {SENTINEL}",))


SENTINEL = Path("/tmp") / f"quire-evil-{os.getpid()}"
EVIL_PYTHON = f"open({str(SENTINEL)!r}, 'w')\n"
NAN_BYTES = b"\xff\xff\xff\x7f"

EARLY: dict[str, Case] = {
    # options (row 92, 94)
    "unknown flag": Case(("--max-num-seq", "--max-num-seqs"), options=("--max-num-seq", "4")),
    "bad dtype": Case(("--dtype", "float7", "float32"), options=("--dtype", "float7")),
    "block size 7": Case(("--block-size", "7", "powers of two"), options=("--block-size", "7")),
    "block size x": Case(("--block-size", "x"), options=("--block-size", "x")),
    "negative count": Case(("--max-num-seqs", "-1"), options=("--max-num-seqs", "-1")),
    "share above one": Case(
        ("--gpu-memory-utilization", "1.5"), options=("--gpu-memory-utilization", "1.5")
    ),
    "zero KV blocks": Case(
        ("no KV block", "--kv-cache-memory-bytes"), options=("--kv-cache-memory-bytes", "1")
    ),
    "too few KV blocks": Case(
        ("--max-model-len 256", "--max-model-len 60"),
        options=("--kv-cache-memory-bytes", str(16 * 4 * 2 * 2 * 2 * 8 * 4), "--block-size", "4"),
    ),
    "context beyond the model": Case(
        ("--max-model-len", "999", "max_position_embeddings"), options=("--max-model-len", "999")
    ),
    "unknown plugin to disable": Case(
        ("attention-sdpq", "attention-sdpa"), options=("--disable-plugin", "attention-sdpq")
    ),
    "unknown quantization": Case(("fp3",), options=("--quantization", "fp3")),
    "unknown implementation": Case(("lama",), options=("--model-implementation", "lama")),
    # prompts and sampling values
    "no prompt": Case(("no prompt", "-p"), prompt=()),
    "empty prompt": Case(("prompt is empty",), prompt=("-p", "")),
    "prompt beyond the context": Case(("256", "--max-model-len"), prompt=("-p", "x" * 300)),
    "load format of a typo": Case(
        ("--load-format", "dumy", "Did you mean 'dummy'"), options=("--load-format", "dumy")
    ),
    "text for dummy weights without a tokenizer": Case(
        ("tokenizer.json", "token ids"),
        both(*(file(n, None) for n in ("model.safetensors", "tokenizer.json"))),
        options=("--load-format", "dummy"),
    ),
    "missing prompts file": Case(("/no/file",), prompt=("--prompts-file", "/no/file")),
    "NaN temperature": Case(("temperature", "nan"), options=("--temperature", "nan")),
    "negative temperature": Case(("temperature", "-1"), options=("--temperature", "-1")),
    "top_p of two": Case(("top_p", "2"), options=("--top-p", "2")),
    "no tokens": Case(("max_tokens", "0"), options=("--max-tokens", "0")),
    "min above max": Case(
        ("min_tokens", "max_tokens"), options=("--min-tokens", "9", "--max-tokens", "3")
    ),
    # config.json (rows 95 to 97)
    "empty folder": Case(
        ("config.json", "no such file"),
        both(*(file(n, None) for n in ("config.json", "model.safetensors", "tokenizer.json"))),
    ),
    "config not JSON": Case(("config.json", "JSON"), file("config.json", "{not json")),
    "config a list": Case(("config.json", "list"), file("config.json", "[1, 2]")),
    "config deeply nested": Case(("config.json",), file("config.json", "[" * 100_000)),
    "no architecture": Case(("config.json", "architectures"), config(architectures=...)),
    "empty architectures": Case(("config.json", "architectures"), config(architectures=[])),
    "unknown architecture": Case(
        ("LlamaForCausalLN", "LlamaForCausalLM", "Qwen3ForCausalLM", "write-a-plugin"),
        config(architectures=["LlamaForCausalLN"]),
    ),
    "no layers": Case(("config.json", "num_hidden_layers", "0"), config(num_hidden_layers=0)),
    "negative layers": Case(("config.json", "num_hidden_layers"), config(num_hidden_layers=-1)),
    "huge vocabulary": Case(("config.json", "vocab_size"), config(vocab_size=10**12)),
    "heads that do not divide": Case(
        ("config.json", "num_attention_heads", "7"), config(num_attention_heads=7)
    ),
    "KV heads that do not divide": Case(
        ("config.json", "num_key_value_heads", "3"), config(num_key_value_heads=3)
    ),
    "text for a number": Case(("config.json", "hidden_size", "256"), config(hidden_size="256")),
    "true for a number": Case(("config.json", "hidden_size"), config(hidden_size=True)),
    "unknown activation": Case(("config.json", "hidden_act", "gelu"), config(hidden_act="gelu")),
    "maths that is not honoured": Case(
        ("config.json", "logit_softcapping"), config(logit_softcapping=30.0)
    ),
    "unknown rope": Case(
        ("config.json", "rope_type", "spiral"), config(rope_scaling={"rope_type": "spiral"})
    ),
    "remote code": Case(
        ("config.json", "auto_map", "--trust-remote-code"),
        both(config(auto_map={"AutoModelForCausalLM": "evil.Evil"}), file("evil.py", EVIL_PYTHON)),
    ),
    "unknown quantization of the checkpoint": Case(
        ("fancy4",), config(quantization_config={"quant_method": "fancy4"})
    ),
    "quantization without a method": Case(
        ("config.json", "quant_method"), config(quantization_config={"bits": 4})
    ),
    # weights (rows 99 to 102)
    "weights of four bytes": Case(("model.safetensors",), weights(lambda data: data[:4])),
    "header of 2**60": Case(
        ("model.safetensors",), weights(lambda data: (1 << 60).to_bytes(8, "little") + data[8:])
    ),
    "garbage header": Case(
        ("model.safetensors",), weights(lambda data: data[:8] + b"\xff" * (len(data) - 8))
    ),
    "truncated weights": Case(("model.safetensors",), weights(lambda data: data[:-100])),
    "weights of NaN": Case(
        ("model.safetensors", "NaN"),
        weights(lambda data: data[: -len(data) // 2] + NAN_BYTES * (len(data) // 8)),
    ),
    "no weights": Case(("no weights", "model.safetensors"), file("model.safetensors", None)),
    "pickled weights": Case(
        ("pytorch_model.bin", "safetensors"),
        both(file("model.safetensors", None), file("pytorch_model.bin", pickle.dumps(Evil()))),
    ),
    "escaping shard": Case(
        ("model.safetensors.index.json", "escapes"), index("../../../../etc/passwd")
    ),
    "missing shard": Case(
        ("model.safetensors.index.json", "m-2.safetensors"), index("m-2.safetensors")
    ),
    # tokenizer and template (rows 104 to 106)
    "tokenizer not JSON": Case(("tokenizer.json",), file("tokenizer.json", "{")),
    "missing tokenizer": Case(("tokenizer.json", "--tokenizer"), file("tokenizer.json", None)),
    "tokenizer larger than the model": Case(("tokenizer", "100"), config(vocab_size=100)),
    "missing template file": Case(("/no/template",), options=("--chat-template", "/no/template")),
    "template syntax": Case(("template",), template("{% for m in messages %}"), seconds=5),
    "template that raises": Case(
        ("template", "boom"), template("{{ raise_exception('boom') }}"), seconds=5
    ),
    "template that reaches out": Case(
        ("template",), template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), seconds=5
    ),
    "template that loops": Case(
        ("template",),
        template(
            "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}"
            "{% endfor %}{% endfor %}{% endfor %}"
        ),
        seconds=8,
    ),
    "template of two gigabytes": Case(("template",), template("{{ 'a' * 2000000000 }}"), seconds=8),
}
"""Decided before torch is imported."""

LATE: dict[str, Case] = {
    "unknown backend": Case(
        ("attention backend 'sdpq'", "sdpa"), options=("--attention-backend", "sdpq")
    ),
    "option of no backend": Case(
        ("--attention-option", "sdpa.x"), options=("--attention-option", "sdpa.x=1")
    ),
    "unknown sampler": Case(("samplr",), options=("--sampler", "samplr")),
    "unknown processor": Case(("penalty",), options=("--logits-processors", "penalty")),
    "no GPU": Case(("--device", "cuda"), options=("--device", "cuda")),
    "more layers than weights": Case(
        ("model.layers.2", "missing", "config.json"), config(num_hidden_layers=3)
    ),
    "fewer layers than weights": Case(
        ("model.layers.1", "unexpected"), config(num_hidden_layers=1)
    ),
    "weights of another shape": Case(
        ("gate_proj", "[48, 32]", "[64, 32]"), config(intermediate_size=64)
    ),
}
"""Decided by what torch knows, or while the weights are loaded."""
