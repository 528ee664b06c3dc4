"""The real class of Transformers on the same tiny config, right or with one known mistake.

Transformers is imported when a model is checked, and never where none is.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quire.testing.model_cases import WEIGHT, ModelSubject, config_json, given_by


def why_missing(subject: ModelSubject) -> str | None:
    """Return why there is no real class to compare with; None: there is one."""
    if "why_missing" not in subject.made:
        subject.made["why_missing"] = _why_missing(subject)
    found: str | None = subject.made["why_missing"]
    return found


def _why_missing(subject: ModelSubject) -> str | None:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return "transformers is not installed; pip install 'transformers>=5' brings the real class"
    if getattr(transformers, _name(subject), None) is None:
        return f"transformers has no class {_name(subject)}"
    return None


def _name(subject: ModelSubject) -> str:
    return subject.oracle or subject.architecture


def _class(subject: ModelSubject) -> Any:
    return getattr(importlib.import_module("transformers"), _name(subject))


def oracle_of(subject: ModelSubject, variation: str, seed: int) -> Any:
    """Return the real class with random weights, in float32; None: it refuses the config."""
    key = ("oracle", variation, seed)
    if key not in subject.made:
        subject.made[key] = _make(subject, config_json(subject, variation), seed)
        model = subject.made[key]
        saved = None if model is None else json.loads(model.config.to_json_string(use_diff=False))
        subject.made["saved", variation] = saved
    return subject.made[key]


def _make(subject: ModelSubject, given: dict[str, Any], seed: int) -> Any:
    real = _class(subject)
    try:
        config = real.config_class(**copy.deepcopy(given))
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = real(config).eval()
            model.gives_vectors = given_by(subject) == "vectors"
            for name, parameter in model.named_parameters():
                is_norm = parameter.dim() == 1 and name.endswith("weight")
                parameter.data.normal_(0.0, WEIGHT).add_(1.0 if is_norm else 0.0)
                parameter.requires_grad_(False)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    return model


def tensors_of(subject: ModelSubject, variation: str, seed: int) -> dict[str, Tensor] | None:
    """Return what the real class writes into a checkpoint; None: it refuses the config.

    In the files' names and shapes: the class in memory may have others, as for experts.
    """
    key = ("tensors", variation, seed)
    if key not in subject.made:
        model = oracle_of(subject, variation, seed)
        subject.made[key] = None if model is None else _written(model)
    found: dict[str, Tensor] | None = subject.made[key]
    return found


def _written(model: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    # It draws a bar of its progress there.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        for file in sorted(Path(folder).glob("*.safetensors")):
            found.update(load_file(file))
    return found


@torch.inference_mode()
def logits_of(model: Any, sequences: list[list[int]], chunk: int | None = None) -> Tensor:
    """Return the logits [tokens, vocab_size] of all tokens, each sequence by itself.

    With `chunk` so many tokens at a time, with the real class's own cache. Of a class without
    logits the last hidden states, of one for sequences their scores.
    """
    found = []
    asked = model.base_model if model.gives_vectors else model
    names = inspect.signature(asked.forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"
    for sequence in sequences:
        size = chunk or len(sequence)
        kept: dict[str, Any] = {}
        for first in range(0, len(sequence), size):
            part = torch.tensor([sequence[first : first + size]])
            options = {"use_cache": chunk is not None} if "use_cache" in names else {}
            done = asked(part, **options, **kept)
            kept = {} if chunk is None else {cache_name: done[cache_name]}
            if model.gives_vectors:
                found.append(done.last_hidden_state[0])
            elif done.logits.dim() == 3:
                found.append(done.logits[0])
            elif first + size >= len(sequence):
                found.append(done.logits)
    return torch.cat(found)


def _with_attribute(model: Any, name: str) -> list[Any]:
    return [m for m in model.modules() if name in vars(m) or name in m._modules]


def _swap_gate_and_up(model: Any) -> bool:
    layers = [m for m in _with_attribute(model, "gate_proj") if hasattr(m, "up_proj")]
    for layer in layers:
        layer.gate_proj, layer.up_proj = layer.up_proj, layer.gate_proj
    return bool(layers)


def _swap_in_experts(model: Any) -> bool:
    fused = [p for n, p in model.named_parameters() if n.endswith(".gate_up_proj") and p.dim() == 3]
    for weight in fused:
        weight.data = torch.cat(weight.data.chunk(2, 1)[::-1], 1)
    return bool(fused)


def _swap_everywhere(model: Any) -> bool:
    return _swap_in_experts(model) and _swap_gate_and_up(model)


def _other_sum(module: Any, given: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple:
    """Normalise what a router gives, or undo it: the hook of a forward pass."""
    logits, weights, expert_ids = out
    raw = logits.float().softmax(-1).take_along_dim(expert_ids, -1)
    normed = raw / raw.sum(-1, keepdim=True)
    is_normed = bool((weights - normed).abs().max() < 1e-4)
    return logits, (raw if is_normed else normed).to(weights.dtype), expert_ids


def _other_weights(model: Any) -> bool:
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    for router in routers:
        router.register_forward_hook(_other_sum)
    return bool(routers)


def _unscale(model: Any) -> bool:
    layers = _with_attribute(model, "scaling")
    for layer in layers:
        layer.scaling = 1.0
    return bool(layers)


def _scale_by_hidden(model: Any) -> bool:
    layers = _with_attribute(model, "scaling")
    for layer in layers:
        layer.scaling = model.config.hidden_size**-0.5
    return bool(layers)


def _drop_final_norm(model: Any) -> bool:
    inner = model.base_model
    if not hasattr(inner, "norm"):
        return False
    inner.norm = nn.Identity()
    return True


def _drop_biases(model: Any) -> bool:
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    for bias in biases:
        bias.data.zero_()
    return bool(biases)


def _drop_rotation(model: Any) -> bool:
    return _set_frequencies(model, lambda frequencies, _: frequencies * 0)


def _default_base(model: Any) -> bool:
    def plain(frequencies: Tensor, head_dim: int) -> Tensor:
        return 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)

    return _set_frequencies(model, plain)


def _set_frequencies(model: Any, change: Callable[[Tensor, int], Tensor]) -> bool:
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None or not hasattr(rotary, "inv_freq"):
        return False
    found = change(rotary.inv_freq, 2 * rotary.inv_freq.shape[-1])
    rotary.inv_freq = found.to(rotary.inv_freq.dtype)
    return True


def _default_eps(model: Any) -> bool:
    norms = _with_attribute(model, "variance_epsilon")
    for norm in norms:
        norm.variance_epsilon = 1e-6
    return bool(norms)


def _plain_norms(model: Any) -> bool:
    weights = [p for n, p in model.named_parameters() if p.dim() == 1 and n.endswith("weight")]
    for weight in weights:
        weight.data.fill_(1.0)
    return bool(weights)


def _tied_head(model: Any) -> bool:
    if model.config.tie_word_embeddings:
        return False
    model.lm_head.weight = model.base_model.embed_tokens.weight
    return True


def _skip_norm(name: str) -> Callable[[Any], bool]:
    def skip(model: Any) -> bool:
        layers = _with_attribute(model, name)
        for layer in layers:
            setattr(layer, name, nn.Identity())
        return bool(layers)

    return skip


MISTAKES = [
    ("gate and up are swapped", _swap_gate_and_up),
    ("gate and up of the experts are swapped", _swap_in_experts),
    ("gate and up are swapped, in experts and beside them", _swap_everywhere),
    (
        "a token's experts are weighed as with the other norm_topk_prob",
        _other_weights,
    ),
    ("attention scores are not scaled", _unscale),
    ("attention scores are scaled by hidden_size instead of head_dim", _scale_by_hidden),
    ("the final norm is missing", _drop_final_norm),
    ("the norm before attention is missing", _skip_norm("input_layernorm")),
    ("the norm before the MLP is missing", _skip_norm("post_attention_layernorm")),
    ("the norm of queries is missing", _skip_norm("q_norm")),
    ("the weights of the norms are not used", _plain_norms),
    ("biases are not added", _drop_biases),
    ("queries and keys are not rotated", _drop_rotation),
    ("RoPE has the base 10000 and no scaling, whatever config.json says", _default_base),
    ("the norms have an eps of 1e-6, whatever config.json says", _default_eps),
    ("the head is tied to the embedding, whatever config.json says", _tied_head),
]


def explain(
    subject: ModelSubject, variation: str, seed: int, sequences: list[list[int]], out: Tensor
) -> str | None:
    """Return the words of the first known mistake that gives the logits that came out."""
    right = oracle_of(subject, variation, seed)
    if right is None or not bool(out.isfinite().all()):
        return "some numbers are not finite: a weight may not be loaded"
    if _is_near(copy.deepcopy(right).double(), sequences, out):
        return None
    for words, put in MISTAKES:
        wrong = copy.deepcopy(right).double()
        with contextlib.suppress(AttributeError, RuntimeError, TypeError, ValueError):
            if put(wrong) and _is_near(wrong, sequences, out):
                return words
    return None


def _is_near(model: Any, sequences: list[list[int]], out: Tensor) -> bool:
    """Answer whether a float64 model gives the logits: it is recognised, not judged."""
    expected = logits_of(model, sequences)
    unit = 256 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    return bool(((out.double() - expected).abs() <= unit).all())
