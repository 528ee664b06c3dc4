"""The engine on a GPU, with two steps in flight, against Transformers on the CPU.

Run on a machine that has one with `pytest -m gpu tests/end_to_end/test_gpu.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file"),
]

NUM_NEW = 24
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": 6}),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 64,
        },
    ),
}
ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "reference attention": {"attention_backend": "reference"},
    "small chunks": {"max_num_batched_tokens": 8, "block_size": 4},
    "preempted": {"block_size": 4, "max_model_len": 96, "max_num_seqs": 8},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder_and_oracle(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, Any]:
    """A tiny random checkpoint and the real class holding it, in float32."""
    import transformers

    name, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model.eval()


def prompts() -> list[list[int]]:
    """Ragged prompts, two with a common beginning."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 211, (n,), generator=generator).tolist() for n in (1, 17, 40, 5, 33)]
    return [*drawn, drawn[2][:32] + drawn[1]]


def greedy(oracle: Any, prompt: list[int]) -> list[int]:
    """Return what Transformers generates."""
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_tokens_on_a_gpu_equal_transformers(
    engine: str, folder_and_oracle: tuple[Path, Any]
) -> None:
    folder, oracle = folder_and_oracle
    options = dict(ENGINES[engine])
    if engine == "preempted":
        heads_by_dim = oracle.config.num_key_value_heads * 16
        options["kv_cache_memory_bytes"] = 30 * 4 * 2 * heads_by_dim * 4 * 3
    torch.backends.cuda.matmul.allow_tf32 = False
    llm = LLM(str(folder), dtype="float32", gpu_memory_utilization=0.2, **options)
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)

    outputs = llm.generate(prompts(), params, use_tqdm=False)

    assert llm.engine.layout.limits.max_steps_in_flight == 2
    # Where the windows of all layers leave blocks behind, all sequences fit.
    is_short = engine == "preempted" and oracle.config.model_type not in ("mistral", "phi3")
    assert (llm.engine.scheduler.num_preemptions > 0) == is_short
    wanted = [greedy(oracle, prompt) for prompt in prompts()]
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    blocks = llm.engine.block_manager
    assert blocks.usage == 0


@pytest.mark.parametrize("name", ["reference", "sdpa", "triton", "cuda", "flashinfer"])
def test_greedy_tokens_in_float32_are_the_same_with_every_backend_that_takes_it(
    name: str, folder_and_oracle: tuple[Path, Any]
) -> None:
    folder, oracle = folder_and_oracle
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        llm = LLM(str(folder), dtype="float32", gpu_memory_utilization=0.2, attention_backend=name)
    except ConfigError as error:
        pytest.skip(str(error))
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)

    outputs = llm.generate(prompts(), params, use_tqdm=False)

    wanted = [greedy(oracle, prompt) for prompt in prompts()]
    assert [output.outputs[0].token_ids for output in outputs] == wanted


def test_seeded_draws_are_the_same_on_gpu_and_cpu(
    folder_and_oracle: tuple[Path, Any],
) -> None:
    folder, _ = folder_and_oracle
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=5, n=2, max_tokens=8)

    found = []
    for device in ("cuda", "cpu"):
        llm = LLM(
            str(folder),
            dtype="float32",
            device=device,
            max_num_seqs=8,
            kv_cache_memory_bytes=1 << 26,
        )
        outputs = llm.generate(prompts()[:3], params, use_tqdm=False)
        found.append([[c.token_ids for c in output.outputs] for output in outputs])

    assert found[0] == found[1]


def test_adjusted_logits_and_logprobs_are_the_same_on_gpu_and_cpu(
    folder_and_oracle: tuple[Path, Any],
) -> None:
    folder, _ = folder_and_oracle
    torch.backends.cuda.matmul.allow_tf32 = False
    adjusted = SamplingParams(
        temperature=0,
        max_tokens=NUM_NEW,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=2,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=-0.2,
        logit_bias={7: 1.5, 9: -3.0},
    )
    plain = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    params = [adjusted, plain] * 3

    gpu, cpu = (
        LLM(str(folder), dtype="float32", device=device, **options).generate(
            prompts(), params, use_tqdm=False
        )
        for device, options in (("cuda", {"gpu_memory_utilization": 0.2}), ("cpu", {}))
    )

    for a, b in zip(gpu, cpu, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        for ours, others in (
            (a.outputs[0].logprobs, b.outputs[0].logprobs),
            (a.prompt_logprobs, b.prompt_logprobs),
        ):
            assert (ours is None) == (others is None)
            for one, other in zip(ours or (), others or (), strict=True):
                assert (one is None) == (other is None)
                values = {i: found.logprob for i, found in (one or {}).items()}
                wanted = {i: found.logprob for i, found in (other or {}).items()}
                assert values == pytest.approx(wanted, abs=2e-4)
