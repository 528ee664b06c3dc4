"""Greedy tokens in float32 equal Transformers' `generate`, however the engine cuts its steps.

Equal means: the same tokens, or at the first difference the two candidates lie so close together in
float64 that float32 cannot tell them apart. Such ties are warnings, which pytest counts and prints.

With QUIRE_TEST_DEVICE=cuda the engines run on a GPU, with the backend that `auto` takes there.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attrs import frozen
from transformers import PreTrainedModel

from quire import LLM, SamplingParams
from quire_kernels.cpu import LIBRARY

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")

DEVICE = os.environ.get("QUIRE_TEST_DEVICE", "cpu")
NUM_NEW, NUM_LONG = 12, 64
VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FULL = "full_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Prompts of 16 tokens or more are attended to in the plain form.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama dynamic": (
        "Llama",
        {
            "max_position_embeddings": 44,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0},
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": YARN,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "phi3": (
        "Phi3",
        {
            "hidden_size": 64,
            "sliding_window": 7,
            "pad_token_id": 0,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.8},
        },
    ),
    "deepseek-v3": ("DeepseekV3", {**LATENT, "q_lora_rank": 12, "attention_bias": True}),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # What nobody claims, with the class of Transformers itself.
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 6}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", FULL]},
    ),
    "gpt2": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}),
    "falcon": ("Falcon", {}),
    "falcon, grouped": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": (
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bloom": ("Bloom", {}),
    # What nobody claims, with the class of Transformers itself.
    "gpt-oss in transformers": (
        "GptOss",
        {"head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2 in transformers": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "cohere2": ("Cohere2", {"sliding_window": 5, "logit_scale": 0.5}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
}
FULL_NAMES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}
# Ragged; some begin alike, so that the prefix cache finds their blocks again.
PROMPT_LENS = (1, 2, 7, 16, 17, 33, 40, 41)
SHARED = 16


@frozen
class Case:
    """How the engine is set up: cuts of steps, of the cache, and of the batch."""

    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    num_cached_tokens: int = 1024
    enable_prefix_caching: bool = True
    num_new: int = NUM_NEW


CASES = {
    "one step a prompt": Case(16, 2048, 8),
    "chunks of 5, blocks of 1": Case(1, 5, 3),
    "chunks of 16, blocks of 8": Case(8, 16, 8),
    "alone, chunks of 7": Case(4, 7, 1, enable_prefix_caching=False),
    "preempted": Case(4, 32, 8, num_cached_tokens=72),
}
PRESSED = Case(4, 16, 8, num_cached_tokens=160, num_new=NUM_LONG)


@frozen
class Checkpoint:
    """A saved model, the real class, and what it generates for each prompt."""

    name: str
    folder: Path
    oracle: PreTrainedModel
    prompts: list[list[int]]
    expected: list[list[int]]


def make_oracle(name: str) -> PreTrainedModel:
    """Make a tiny model of the real class with random weights, norms and biases included."""
    family, changes = MODELS[name]
    torch.manual_seed(3)
    names = FULL_NAMES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config_class, model_class = (getattr(transformers, name) for name in names)
    config = config_class(**{**SIZES, "bos_token_id": 1, "eos_token_id": 2, **changes})
    # Falcon's plain form adds ALiBi twice.
    config._attn_implementation = "sdpa" if getattr(config, "alibi", False) else "eager"
    config._experts_implementation = "eager"
    model: PreTrainedModel = model_class(config).eval()
    for weight_name, parameter in model.named_parameters():
        parameter.data.normal_(0.0, 0.25).add_(
            1.0 if "norm" in weight_name or "ln_" in weight_name else 0.0
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make_prompts() -> list[list[int]]:
    ids = torch.randint(0, VOCAB, (len(PROMPT_LENS), max(PROMPT_LENS))).tolist()
    for row in ids[-2:]:
        row[:SHARED] = ids[3][:SHARED]
    return [row[:length] for row, length in zip(ids, PROMPT_LENS, strict=True)]


@torch.inference_mode()
def generate(oracle: PreTrainedModel, prompt: list[int]) -> list[int]:
    given = torch.tensor([prompt])
    found = oracle.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NUM_LONG, do_sample=False
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    oracle = make_oracle(request.param)
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    prompts = make_prompts()
    expected = [generate(oracle, prompt) for prompt in prompts]
    return Checkpoint(request.param, folder, oracle, prompts, expected)


@torch.inference_mode()
def explain_difference(oracle: PreTrainedModel, tokens: list[int], ours: int, theirs: int) -> str:
    """Warn of a tie after `tokens`, or say why it is none."""
    plain = oracle(torch.tensor([tokens])).logits[0, -1].double()
    exact_model = oracle.double()
    exact = exact_model(torch.tensor([tokens])).logits[0, -1]
    oracle.float()
    unit = torch.finfo(torch.float32).eps * float(exact.abs().max())
    # Each of the two logits may err by twice as much as plain PyTorch, plus one rounding.
    bound = 2 * (2 * float((plain - exact).abs().max()) + unit)
    gap = abs(float(exact[ours] - exact[theirs]))
    if gap > bound:
        return f"after {len(tokens)} tokens {ours} instead of {theirs}: {gap:.3g} > {bound:.3g}"
    warnings.warn(f"a tie after {len(tokens)} tokens: {gap:.3g} <= {bound:.3g}", stacklevel=2)
    return ""


def first_difference(checkpoint: Checkpoint, number: int, found: list[int]) -> str:
    """Return what is wrong with the tokens found for a prompt, or nothing."""
    prompt, expected = checkpoint.prompts[number], checkpoint.expected[number][: len(found)]
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            tokens = prompt + expected[:i]
            why = explain_difference(checkpoint.oracle, tokens, ours, theirs)
            return why and f"prompt {number}: {why}"
    return ""


def num_kv_heads(config: Any) -> int:
    kind, heads = config.model_type, SIZES["num_attention_heads"]
    if kind == "falcon" and config.new_decoder_architecture:
        return int(config.num_kv_heads)
    is_one = kind == "falcon" and config.multi_query
    if is_one or kind in ("gpt2", "opt", "falcon", "bloom"):
        return 1 if is_one else heads
    return int(SIZES["num_key_value_heads"])


def make_llm(checkpoint: Checkpoint, case: Case, attention: str = "sdpa") -> LLM:
    config = checkpoint.oracle.config
    has_cap = getattr(config, "attn_logit_softcapping", None)
    if attention == "sdpa" and (has_cap or config.model_type == "gpt_oss"):
        attention = "reference"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
    elements = 2 * SIZES["num_hidden_layers"] * num_kv_heads(config) * head_dim
    if config.model_type.startswith("deepseek"):
        attention = "reference" if attention == "sdpa" else "auto"
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        elements = SIZES["num_hidden_layers"] * latent
    return LLM(
        str(checkpoint.folder),
        dtype="float32",
        device=DEVICE,
        attention_backend=attention if DEVICE == "cpu" else "auto",
        num_threads=1,
        max_model_len=max(PROMPT_LENS) + case.num_new,
        model_implementation="transformers" if "transformers" in checkpoint.name else "auto",
        block_size=case.block_size,
        max_num_batched_tokens=case.max_num_batched_tokens,
        max_num_seqs=case.max_num_seqs,
        enable_prefix_caching=case.enable_prefix_caching,
        kv_cache_memory_bytes=4 * elements * (case.num_cached_tokens + case.block_size),
    )


def complete(llm: LLM, prompts: list[list[int]], num_new: int = NUM_NEW) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, params, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert [len(tokens) for tokens in found] == [num_new] * len(prompts)
    return found


NEEDS_CPU_KERNELS = pytest.mark.skipif(
    LIBRARY.why_unusable() is not None, reason=f"backend cpu: {LIBRARY.why_unusable()}"
)


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param("sdpa", marks=pytest.mark.slow),
        pytest.param("cpu", marks=NEEDS_CPU_KERNELS),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(
    checkpoint: Checkpoint, name: str, attention: str
) -> None:
    found = complete(make_llm(checkpoint, CASES[name], attention), checkpoint.prompts)
    wrong = [first_difference(checkpoint, i, tokens) for i, tokens in enumerate(found)]
    assert [line for line in wrong if line] == []


def test_greedy_tokens_equal_transformers_with_a_warm_prefix_cache(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint, CASES["chunks of 16, blocks of 8"])
    complete(llm, checkpoint.prompts)
    found = complete(llm, checkpoint.prompts[::-1])[::-1]
    wrong = [first_difference(checkpoint, i, tokens) for i, tokens in enumerate(found)]
    assert [line for line in wrong if line] == []


def test_many_greedy_tokens_equal_transformers_under_pressure(checkpoint: Checkpoint) -> None:
    """Chunks, cached prefixes and preemption at once."""
    llm = make_llm(checkpoint, PRESSED)
    complete(llm, checkpoint.prompts[-3:])
    found = complete(llm, checkpoint.prompts, NUM_LONG)
    # Where windows leave blocks behind there is room for all; test_windows.py preempts by force.
    forgets = any(name in checkpoint.name for name in ("mistral", "phi3", "cohere2"))
    assert llm.engine.scheduler.num_preemptions > 0 or forgets
    wrong = [first_difference(checkpoint, i, tokens) for i, tokens in enumerate(found)]
    assert [line for line in wrong if line] == []
