"""Mistakes that a model's author makes, put into the real class of Transformers.

Each puts one into a copy and says whether the class has the place for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _with_attribute(model: Any, name: str) -> list[Any]:
    return [m for m in model.modules() if name in vars(m) or name in m._modules]


def _swap_gate_and_up(model: Any) -> bool:
    layers = [m for m in _with_attribute(model, "gate_proj") if hasattr(m, "up_proj")]
    for layer in layers:
        layer.gate_proj, layer.up_proj = layer.up_proj, layer.gate_proj
    fused = [m.gate_up_proj for m in model.modules() if "gate_up_proj" in m._modules]
    for linear in fused:
        linear.weight.data = torch.cat(linear.weight.data.chunk(2)[::-1])
    return bool(layers or fused)


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


def _halves_in_experts(model: Any) -> bool:
    """Let gates come before ups where they take turns, in the last dimension."""
    experts = [m for m in model.modules() if hasattr(m, "gate_up_proj_bias")]
    for own in experts:
        for weight in (own.gate_up_proj, own.gate_up_proj_bias):
            halves = weight.data.chunk(2, -1)
            weight.data = torch.stack(halves, -1).flatten(-2)
    return bool(experts)


def _plain_swiglu(model: Any) -> bool:
    experts = _with_attribute(model, "limit")
    for own in experts:
        own.limit = 1e9
    return bool(experts)


def _drop_sinks(model: Any) -> bool:
    sinks = [p for name, p in model.named_parameters() if name.endswith(".sinks")]
    for sink in sinks:
        sink.data.fill_(-1e9)
    return bool(sinks)


def _drop_correction(model: Any) -> bool:
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias.zero_()
    return bool(biases)


def _set_in_routers(name: str, value: Any) -> Callable[[Any], bool]:
    def put(model: Any) -> bool:
        routers = [m for m in _with_attribute(model, name) if hasattr(m, "top_k")]
        for router in routers:
            setattr(router, name, value)
        return bool(routers)

    return put


_unscaled_experts = _set_in_routers("routed_scaling_factor", 1.0)


def _one_group(model: Any) -> bool:
    return _set_in_routers("num_group", 1)(model) and _set_in_routers("topk_group", 1)(model)


def _plain_greedy(model: Any) -> bool:
    return _set_in_routers("topk_method", "greedy")(model)


def _drop_rotated_part(model: Any) -> bool:
    """Leave the rotated part of keys out, which all heads of latent attention share."""
    layers = _with_attribute(model, "kv_a_proj_with_mqa")
    for layer in layers:
        layer.kv_a_proj_with_mqa.weight.data[layer.kv_lora_rank :] = 0
    return bool(layers)


def _unscale(model: Any) -> bool:
    names = ("scaling", "inv_norm_factor")
    found = [(layer, name) for name in names for layer in _with_attribute(model, name)]
    for layer, name in found:
        setattr(layer, name, 1.0)
    return bool(found)


def _scale_by_hidden(model: Any) -> bool:
    layers = _with_attribute(model, "scaling")
    for layer in layers:
        layer.scaling = model.config.hidden_size**-0.5
    return bool(layers)


def _drop_final_norm(model: Any) -> bool:
    inner = model.base_model
    name = next((name for name in ("norm", "ln_f") if hasattr(inner, name)), None)
    if name is not None:
        setattr(inner, name, nn.Identity())
    return name is not None


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
    # Some types go back to what they began with, or multiply cosines and sines.
    rotary.original_inv_freq, rotary.attention_scaling = rotary.inv_freq.clone(), 1.0
    return True


def _drop_positions(model: Any) -> bool:
    embedding = getattr(model.base_model, "wpe", None)
    if embedding is not None:
        embedding.weight.data.zero_()
    return embedding is not None


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
    model.lm_head.weight = model.get_input_embeddings().weight
    return True


def _skip_norm(*names: str) -> Callable[[Any], bool]:
    def skip(model: Any) -> bool:
        found = [(layer, name) for name in names for layer in _with_attribute(model, name)]
        for layer, name in found:
            setattr(layer, name, nn.Identity())
        return bool(found)

    return skip


def _skip_norm_before_mlp(model: Any) -> bool:
    """Skip the norm that is called after attention unless there is one after the MLP as well."""
    is_behind = bool(_with_attribute(model, "post_feedforward_layernorm"))
    name = "pre_feedforward_layernorm" if is_behind else "post_attention_layernorm"
    return _skip_norm(name, "ln_2")(model)


MISTAKES = [
    ("gate and up are swapped", _swap_gate_and_up),
    ("gate and up of the experts are swapped", _swap_in_experts),
    ("gate and up are swapped, in experts and beside them", _swap_everywhere),
    (
        "a token's experts are weighed as with the other norm_topk_prob",
        _other_weights,
    ),
    ("gates and ups of the experts are read as halves, not in turns", _halves_in_experts),
    ("the limit of the experts' gates is ignored", _plain_swiglu),
    ("the experts' weights are not multiplied by routed_scaling_factor", _unscaled_experts),
    ("experts of all groups are chosen", _one_group),
    ("experts of all groups are chosen, as by topk_method greedy", _plain_greedy),
    ("the bias of the choice of experts is ignored", _drop_correction),
    ("the latents' norm is missing", _skip_norm("kv_a_layernorm")),
    ("the norm of the queries' latents is missing", _skip_norm("q_a_layernorm")),
    ("the rotated part of keys is left out", _drop_rotated_part),
    ("the sinks are ignored", _drop_sinks),
    ("attention scores are not scaled", _unscale),
    ("attention scores are scaled by hidden_size instead of head_dim", _scale_by_hidden),
    ("the final norm is missing", _drop_final_norm),
    ("the norm before attention is missing", _skip_norm("input_layernorm", "ln_1")),
    ("the norm before the MLP is missing", _skip_norm_before_mlp),
    ("the norm behind attention is missing", _skip_norm("post_attention_layernorm")),
    ("the norm behind the MLP is missing", _skip_norm("post_feedforward_layernorm")),
    ("the norm of queries is missing", _skip_norm("q_norm")),
    ("the weights of the norms are not used", _plain_norms),
    ("biases are not added", _drop_biases),
    ("queries and keys are not rotated", _drop_rotation),
    ("embeddings of positions are not added", _drop_positions),
    ("RoPE has the base 10000 and no scaling, whatever config.json says", _default_base),
    ("the norms have an eps of 1e-6, whatever config.json says", _default_eps),
    ("the head is tied to the embedding, whatever config.json says", _tied_head),
]
