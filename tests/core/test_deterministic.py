"""`--deterministic`: a request's logits have the same bits alone and in any company."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import CONFIG, OPTIONS, has_all_blocks, prompt, request
from torch import Tensor

from quire.config import EngineConfig
from quire.engine import Engine
from quire.errors import ConfigError
from quire.frontend import Frontend
from quire.request import Request
from quire.server.served_engine import ServedEngine
from quire_kernels.cpu import LIBRARY

# Sizes that fill no vector, so that what is left over would be computed in another way.
SIZES: dict[str, Any] = {
    **CONFIG,
    "vocab_size": 103,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}
BACKENDS = ["reference", "cpu"]
BLOCK_BYTES = 4 * 2 * 2 * 3 * 12 * 4  # of 4 tokens in float32
Bits = dict[tuple[str, int, int], Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, keys in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "config.json").write_text(json.dumps({**SIZES, **keys}))
    return found


def start(folder: Path, **options: Any) -> Engine:
    given = {**OPTIONS, "model": str(folder), "load_format": "dummy", "deterministic": True}
    return Engine(Frontend(EngineConfig.from_options({**given, **options})).prepared)


def record(engine: Engine) -> Bits:
    """Let an engine keep the logits that it draws from, by request, index and position."""
    kept: Bits = {}
    sample = engine.runner._sample

    def keep(logits: Tensor, built: Any, step: Any) -> None:
        owners = {
            s.sequence_id: s for all_of in engine.scheduler._requests.values() for s in all_of
        }
        for i, sequence_id in enumerate(built.sampled_ids):
            own = owners[sequence_id]
            place = own.request_id, own.index, int(built.sampled_positions[i])
            # What is computed again after a preemption has to be the same again.
            assert place not in kept or torch.equal(kept[place], logits[i]), place
            kept[place] = logits[i].clone()
        sample(logits, built, step)

    engine.runner._sample = keep  # type: ignore[method-assign]
    return kept


def run(engine: Engine, requests: list[Request], *, at_once: int = 99) -> dict[Any, list[int]]:
    """Run requests, so many more a step."""
    tokens: dict[Any, list[int]] = {}
    waiting = list(requests)
    while waiting or engine.has_unfinished():
        for one in waiting[:at_once]:
            engine.add_request(one)
        waiting = waiting[at_once:]
        for update in engine.step():
            tokens.setdefault((update.request_id, update.index), []).extend(update.token_ids)
    return tokens


def check_same(found: Bits, alone: Bits) -> None:
    """Compare every logit that was drawn from."""
    assert found.keys() == alone.keys()
    for place, logits in alone.items():
        assert torch.equal(found[place], logits), place


@frozen
class Alone:
    """What each request gives on an engine that does nothing else."""

    bits: Bits
    tokens: dict[Any, list[int]]


STORIES: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 5, "n": 2},
    {},
    {"temperature": 0.7, "top_p": 0.8, "seed": 6},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.3, "top_k": 7, "min_p": 0.05, "seed": 7},
    {"logit_bias": {3: 5.0}, "max_tokens": 4},
    {"temperature": 1.0, "seed": 8, "logprobs": 3, "prompt_logprobs": 2},
]
LENGTHS = (1, 5, 9, 17, 33, 40, 12)


def requests() -> list[Request]:
    """Return requests of which some begin alike."""
    common = prompt(50, 13)
    found = []
    for i, (length, params) in enumerate(zip(LENGTHS, STORIES, strict=True)):
        ids = [token % 101 for token in prompt(i, length)]
        found.append(request(i, (common + ids)[: max(length, 1)] if i % 2 else ids, **params))
    return found


def alone(folder: Path, **options: Any) -> Alone:
    engine = start(folder, **options)
    kept, tokens = record(engine), {}
    for one in requests():
        tokens.update(run(engine, [one]))
    return Alone(kept, tokens)


WHERE = [
    ("llama", "reference", "float32"),
    ("qwen3", "reference", "float32"),
    ("llama", "cpu", "bfloat16"),
    ("qwen3", "cpu", "float32"),
    ("qwen3", "reference", "bfloat16"),
]


@pytest.fixture(scope="module", params=WHERE, ids="-".join)
def story(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    family, backend, dtype = request.param
    if backend == "cpu" and LIBRARY.why_unusable() is not None:
        pytest.skip(f"backend cpu: {LIBRARY.why_unusable()}")
    options = {"attention_backend": backend, "dtype": dtype}
    torch.set_num_threads(1)
    plain = {**options, "enable_prefix_caching": False}
    return folders[family], options, alone(folders[family], **plain)


@given(
    order=st.permutations(range(len(LENGTHS))),
    num_tokens=st.sampled_from([3, 7, 16, 64, 2048]),
    num_rows=st.integers(1, 8),
    num_blocks=st.sampled_from([24, 30, 500]),
    at_once=st.integers(1, 7),
    has_prefix_cache=st.booleans(),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_logits_are_bit_equal_whatever_shares_the_steps(
    story: Any,
    order: list[int],
    num_tokens: int,
    num_rows: int,
    num_blocks: int,
    at_once: int,
    has_prefix_cache: bool,
) -> None:
    folder, options, expected = story
    engine = start(
        folder,
        **options,
        max_num_batched_tokens=num_tokens,
        max_num_seqs=min(num_rows, num_tokens),
        max_model_len=60,
        kv_cache_memory_bytes=num_blocks * BLOCK_BYTES,
        enable_prefix_caching=has_prefix_cache,
    )
    kept, mixed = record(engine), requests()

    tokens = run(engine, [mixed[i] for i in order], at_once=at_once)

    check_same(kept, expected.bits)
    assert tokens == expected.tokens
    assert has_all_blocks(engine)


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_bit_equal_at_sizes_that_threads_share(tmp_path: Path, threads: int) -> None:
    sizes = {"hidden_size": 264, "intermediate_size": 1000, "head_dim": 44, "vocab_size": 1003}
    (tmp_path / "config.json").write_text(
        json.dumps({**SIZES, **FAMILIES["llama"], **sizes, "num_hidden_layers": 1})
    )
    options = {"attention_backend": "reference", "num_threads": threads}
    many = [request(i, prompt(i, 60), max_tokens=3, prompt_logprobs=1) for i in range(8)]
    one = start(tmp_path, **options)
    expected = record(one)
    for each in many:
        run(one, [each])
    engine = start(tmp_path, **options)
    found = record(engine)

    run(engine, many)

    check_same(found, expected)


def test_logits_are_bit_equal_with_triton(folders: dict[str, Path]) -> None:
    options = {"attention_backend": "triton", "sampler": "triton"}
    mixed = [
        request(0, prompt(0, 9), max_tokens=3, temperature=1.0),
        request(1, prompt(1, 5), max_tokens=4),
        request(2, prompt(1, 5), max_tokens=2, temperature=0.5, top_p=0.7),
    ]
    one = start(folders["qwen3"], **options)
    expected = record(one)
    for each in mixed:
        run(one, [each])
    engine = start(folders["qwen3"], **options, max_num_batched_tokens=4, max_num_seqs=3)
    found = record(engine)

    run(engine, mixed)

    check_same(found, expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"attention_backend": "sdpa"},
        "--attention-backend sdpa cannot be used: it does not declare batch_invariant, which "
        "--deterministic asks for; of those installed these would do: .*reference",
    ),
    (
        {"attention_backend": "prefill=cpu,decode=reference"},
        "with --deterministic one backend serves all steps",
    ),
    (
        {"quantization": "int8"},
        "quantization method 'int8' cannot be used: how it keeps .* does not declare "
        "batch_invariant; of those installed these would do: none",
    ),
    (
        {"logits_processors": ["top_n_sigma"]},
        "top_n_sigma cannot be used: .*these would do: watermark",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_plugin_that_does_not_declare_it_is_refused(
    folders: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(folders["llama"], **options)


def test_a_model_that_does_not_declare_it_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire_models.llama.model import Llama

    monkeypatch.setattr(Llama, "batch_invariant", False)

    with pytest.raises(ConfigError, match="model implementation 'llama' cannot be used: .* qwen3"):
        start(folders["llama"], attention_backend="auto")


def test_auto_passes_over_what_does_not_declare_it(folders: dict[str, Path]) -> None:
    engine = start(folders["llama"], attention_backend="auto", disable_plugin="attention-cpu")

    (choice,) = [one for one in engine.selections if one.kind == "attention"]

    assert choice.used == "reference"
    assert "does not declare batch_invariant" in dict(choice.passed_over)["sdpa"]


def test_identity_tells_the_mode_and_the_versions(folders: dict[str, Path]) -> None:
    def identity(**options: Any) -> list[str]:
        engine = start(folders["llama"], attention_backend="reference", **options)
        return ServedEngine(engine).ready({}).identity

    exact, fast = identity(), identity(deterministic=False)

    assert set(exact) - set(fast) == {"mode: deterministic"}
    assert set(fast) - set(exact) == {"mode: fast"}
    assert f"torch: {torch.__version__}" in exact
    assert f"attention: reference of quire {version('quire')}" in exact
    assert f"model: {folders['llama']}" in exact
