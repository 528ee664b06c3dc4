"""Backend `cpu`: every instruction set, long sequences in splits, the same bits on any threads."""

from __future__ import annotations

import platform
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.hooks.registry import load_plugins
from quire.hooks.selection import parse_attention_options
from quire.interfaces.attention import BatchLimits
from quire.testing.attention_cases import Case, Layer, make_batch, make_inputs, make_spec
from quire.testing.attention_run import Subject, run
from quire.testing.dense import check_within_bound, judge_log_sums
from quire.testing.kit import AttentionBackendTests, Profile
from quire_attention.cpu.backend import CpuAttention
from quire_kernels.cpu import ISAS, LIBRARY, build, calls

pytestmark = pytest.mark.skipif(
    LIBRARY.why_unusable() is not None, reason=f"backend cpu: {LIBRARY.why_unusable()}"
)
FEW = Profile(name="few", seconds=4, examples=60, longest=300, shrink_s=1, least=4)
LIMITS = BatchLimits(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=2048)


def test_library_compiles_for_every_instruction_set() -> None:
    said: list[str] = []

    assert build(said.append).startswith(str(LIBRARY.find()))


def needs_isa(name: str) -> pytest.MarkDecorator:
    """Skip where the processor has no such instructions, or the library cannot be asked."""
    usable = LIBRARY.why_unusable() is None and LIBRARY.is_built()
    missing = usable and not calls.has_isa(ISAS.index(name))
    return pytest.mark.skipif(missing, reason=f"this processor has no {name}")


@needs_isa("plain")
class TestPlain(AttentionBackendTests):
    backend, profile, options = CpuAttention, FEW, {"isa": "plain"}


@needs_isa("avx2")
class TestAvx2(AttentionBackendTests):
    backend, profile, options = CpuAttention, FEW, {"isa": "avx2"}


@needs_isa("avx512")
class TestAvx512(AttentionBackendTests):
    backend, profile, options = CpuAttention, FEW, {"isa": "avx512"}


@needs_isa("avx512_bf16")
class TestAvx512Bf16(AttentionBackendTests):
    backend, profile = CpuAttention, FEW
    options: ClassVar[dict[str, str]] = {"isa": "avx512_bf16"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("lengths", [((1, 1100),), ((1, 257), (1, 513), (70, 800)), ((5, 1025),)])
def test_sequences_of_several_splits_are_within_the_bound(
    dtype: str, window: int | None, lengths: tuple[tuple[int, int], ...]
) -> None:
    dims = {"head_dim": 40, "value_head_dim": 24, "num_heads": 6, "num_kv_heads": 2}
    spec = make_spec(dtype=dtype, kv_dtype=dtype, block_size=16, sliding_window=window, **dims)
    case = Case(spec=spec, lengths=lengths)
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(CpuAttention, case, inputs).out)


@pytest.mark.parametrize(
    "heads", [{"num_heads": 40, "num_kv_heads": 1}, {"num_heads": 71, "num_kv_heads": 1}]
)
def test_groups_larger_than_a_tile_are_within_the_bound(heads: dict[str, int]) -> None:
    spec = make_spec(dtype="bfloat16", kv_dtype="bfloat16", **heads)
    case = Case(spec=spec, lengths=((1, 30), (4, 9)))
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(CpuAttention, case, inputs).out)


def outputs(case: Case, num_threads: int) -> list[Tensor]:
    """Return what comes out with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return run(CpuAttention, case, make_inputs(case)).out
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "lengths", [((1, 2000),), ((1, 900), (1, 20), (60, 700)), tuple((1, 300 + n) for n in range(9))]
)
def test_bits_do_not_depend_on_the_number_of_threads(lengths: tuple[tuple[int, int], ...]) -> None:
    dims = {"head_dim": 64, "value_head_dim": 64, "num_heads": 8, "num_kv_heads": 4}
    spec = make_spec(dtype="bfloat16", kv_dtype="bfloat16", block_size=16, **dims)
    case = Case(spec=spec, lengths=lengths)

    alone, shared = outputs(case, 1), outputs(case, 3)

    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_work_is_spread_over_pytorchs_own_threads() -> None:
    assert calls.library().quire_has_threads()


def test_float16_goes_there_and_back_for_all_its_numbers() -> None:
    """Each value of float16 is a value that attention to one key returns."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    dims = {"head_dim": 8, "value_head_dim": 64, "num_heads": 1, "num_kv_heads": 1}
    spec = make_spec(dtype="float16", kv_dtype="float16", block_size=16, **dims)
    values = every.view(-1, 1, 64)
    num_tokens = len(values)
    limits = BatchLimits(max_num_seqs=2000, max_num_batched_tokens=2000, max_model_len=16)
    backend = CpuAttention(spec, limits, {})
    tables = [[1 + n] for n in range(num_tokens)]
    batch = make_batch([(0, 1)] * num_tokens, tables, 16)
    cache = torch.zeros(num_tokens + 1, *backend.kv_layout(spec).block_shape, dtype=torch.float16)
    q, out = torch.ones(num_tokens, 1, 8).half(), torch.zeros_like(values)

    plan = backend.plan(batch, 0)
    backend.write(Layer(), q, values, cache, plan)
    backend.attend(Layer(), q, q, values, cache, plan, out)

    is_nan = every.isnan().view_as(values)
    assert torch.equal(out.isnan(), is_nan)
    assert torch.equal(out[~is_nan], values[~is_nan])


def test_soft_caps_and_sinks_work_over_several_splits() -> None:
    spec = make_spec(block_size=16, logit_softcap=3.0, sinks=True)
    case = Case(spec=spec, lengths=((1, 700), (33, 600)))
    inputs = make_inputs(case)

    found = run(CpuAttention, case, inputs, wants_lse=True)

    check_within_bound(case, inputs, found.out)
    assert found.lse is not None
    assert judge_log_sums(case, inputs, found.lse).is_right


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are instruction sets of x86")
def test_instruction_set_that_the_processor_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "has_isa", lambda number: number < 1)

    with pytest.raises(ConfigError) as caught:
        CpuAttention(make_spec(), LIMITS, {"isa": "avx512"})

    assert str(caught.value) == (
        "--attention-option cpu.isa=avx512: this processor has no avx512; it has plain."
    )


def test_instruction_set_that_does_not_exist_is_refused() -> None:
    registry = load_plugins()

    with pytest.raises(ConfigError, match="no instruction set; allowed: auto, plain, avx2"):
        parse_attention_options(registry, [registry.attention("cpu")], ["cpu.isa=sse"])


REFUSED = {
    "latent attention": {"latent": object()},
    "KV cache in another dtype": {"kv_dtype": "float16"},
    "float64": {"dtype": "float64", "kv_dtype": "float64"},
    "heads beyond 1024": {"head_dim": 1032},
    "memory of a cuda device": {"device": "cuda"},
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED.keys())
def test_cpu_says_what_it_cannot_do(words: str, change: dict[str, object]) -> None:
    reason = CpuAttention.why_unsupported(make_spec(**change))

    assert reason is not None
    assert words in reason


def test_workspace_is_no_less_than_what_is_held() -> None:
    spec = make_spec(block_size=16, head_dim=64, value_head_dim=64, num_heads=8, num_kv_heads=2)
    case = Case(spec=spec, lengths=((1, 2000),))
    backend = Subject(backend=CpuAttention).make(case)

    backend.plan(make_batch([(1999, 2000)], [list(range(1, 126))], 16), 0)

    held = backend._scratch.nbytes + backend._parts.nbytes + backend._finished.nbytes
    assert 0 < held <= CpuAttention.workspace_bytes(spec, LIMITS)
