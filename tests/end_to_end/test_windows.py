"""Windows much shorter than contexts: the tokens of Transformers, in the memory that they leave."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attrs import frozen
from transformers import PreTrainedModel

from quire import LLM, SamplingParams
from quire.cli.explain import explain
from quire.errors import ConfigError

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")

VOCAB, WINDOW, NUM_NEW, MAX_LEN = 101, 5, 24, 160
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Slabs of 3 layers' blocks: one of the three with a window, three of the one without.
KINDS = {
    "hybrid": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 8, "layer_types": [SLIDING, SLIDING, FULL, SLIDING], "num_hidden_layers": 4},
    ),
    "window alone": ("MistralConfig", "MistralForCausalLM", {"num_hidden_layers": 2}),
}


@frozen
class Checkpoint:
    """A saved model, and what the real class generates for each prompt."""

    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]


@torch.inference_mode()
def generate(oracle: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Decode greedily without a cache, each time over all tokens."""
    tokens = list(prompt)
    for _ in range(NUM_NEW):
        best = oracle(torch.tensor([tokens]), use_cache=False).logits[0, -1].double().topk(2)
        assert best.values[0] - best.values[1] > 1e-4, "a tie: draw other weights"
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config_name, model_name, changes = KINDS[request.param]
    torch.manual_seed(4)
    config = getattr(transformers, config_name)(**SIZES, sliding_window=WINDOW, **changes)
    config._attn_implementation = "eager"
    oracle = getattr(transformers, model_name)(config).eval()
    for name, parameter in oracle.named_parameters():
        parameter.data.normal_(0.0, 0.25).add_(1.0 if "norm" in name else 0.0)
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    # The last two begin like the first one, half of it and all of it.
    prompts = torch.randint(3, VOCAB, (6, 120)).tolist()
    lengths = (110, 3, 60, 41, 77, 120)
    prompts = [ids[:length] for ids, length in zip(prompts, lengths, strict=True)]
    prompts[4][:56] = prompts[0][:56]
    prompts[5][:110] = prompts[0]
    return Checkpoint(folder, prompts, [generate(oracle, prompt) for prompt in prompts])


def make_llm(checkpoint: Checkpoint, num_kv_bytes: int, **options: Any) -> LLM:
    """Start with so many bytes of KV cache; blocks of 4 tokens."""
    return LLM(
        str(checkpoint.folder),
        dtype="float32",
        device="cpu",
        attention_backend="sdpa",
        num_threads=1,
        block_size=4,
        kv_cache_memory_bytes=num_kv_bytes,
        **options,
    )


def complete(llm: LLM, checkpoint: Checkpoint, n: int = 1) -> list[list[list[int]]]:
    """Return the answers of each prompt."""
    params = SamplingParams(
        temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False, n=n
    )
    given = [{"prompt_token_ids": prompt} for prompt in checkpoint.prompts]
    outputs = llm.generate(given, params, use_tqdm=False)
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


def bytes_of_longest(checkpoint: Checkpoint, chunk: int) -> int:
    """Return what the longest sequence needs, without block 0."""
    llm = make_llm(checkpoint, 1 << 22, max_num_batched_tokens=chunk, max_num_seqs=1)
    memory = explain(llm.frontend)["memory"]
    windows = memory["windows"]
    assert windows["sequence_bytes"] < 0.6 * windows["sequence_bytes_without_windows"]
    return int(windows["sequence_bytes"])


def preempt_now_and_then(llm: LLM) -> None:
    """Take the blocks of the last one every ninth step, wherever it stands."""
    scheduler, steps = llm.engine.scheduler, itertools.count(1)
    schedule = scheduler.schedule

    def disturbed() -> Any:
        running = [s for s in scheduler._running if not s.owes_a_token]
        if running and next(steps) % 9 == 0:
            scheduler._preempt(running[-1])
        return schedule()

    scheduler.schedule = disturbed


SETUPS: dict[str, dict[str, Any]] = {
    "chunks of 9": {"max_num_batched_tokens": 9, "max_num_seqs": 8},
    "chunks of 16, no prefix cache": {
        "max_num_batched_tokens": 16,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    },
}


@pytest.mark.parametrize("name", SETUPS)
def test_tokens_equal_transformers_in_memory_for_little_more_than_one_sequence(
    checkpoint: Checkpoint, name: str
) -> None:
    chunk = SETUPS[name]["max_num_batched_tokens"]
    llm = make_llm(checkpoint, int(1.6 * bytes_of_longest(checkpoint, chunk)), **SETUPS[name])

    preempt_now_and_then(llm)

    found = [complete(llm, checkpoint), complete(llm, checkpoint)]

    assert found == [[[tokens] for tokens in checkpoint.expected]] * 2
    assert llm.engine.scheduler.num_preemptions > 3
    assert llm.engine.block_manager.num_used_blocks == 0


def test_prefixes_are_found_and_siblings_fork_behind_windows(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint, 1 << 20, max_num_batched_tokens=32, max_num_seqs=16)

    found = [complete(llm, checkpoint, n=3), complete(llm, checkpoint, n=3)]

    assert found == [[[tokens] * 3 for tokens in checkpoint.expected]] * 2
    # All but the last block of each prompt, in the second run.
    cached = sum((len(prompt) - 1) // 4 * 4 for prompt in checkpoint.prompts)
    assert llm.engine.block_manager.num_hit_tokens >= cached
    assert llm.engine.scheduler.num_preemptions == 0


def test_longest_length_is_the_one_that_windows_make_possible(checkpoint: Checkpoint) -> None:
    options = {"max_num_batched_tokens": 8, "max_num_seqs": 8}
    with pytest.raises(ConfigError) as error:
        make_llm(checkpoint, bytes_of_longest(checkpoint, 8), **options)
    least = int(str(error.value).rpartition(" ")[2].rstrip("."))  # block 0 is missing

    llm = make_llm(checkpoint, least, **options)

    assert llm.engine.max_model_len == MAX_LEN
    assert complete(llm, checkpoint) == [[tokens] for tokens in checkpoint.expected]
