"""Each backend against the conformance kit, and what is its own."""

from typing import Any

import attrs
import pytest
import torch

from quire.interfaces.attention import AttentionBackend
from quire.testing.attention_cases import Case, Layer, make_batch, make_inputs, make_spec
from quire.testing.attention_run import run
from quire.testing.dense import attention, check_within_bound
from quire.testing.kit import AttentionBackendTests, Profile
from quire_attention.cpu.backend import CpuAttention
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.sdpa.backend import SdpaAttention
from quire_attention.triton.backend import TritonAttention
from quire_kernels.cpu import LIBRARY

# Where backends for GPUs are tested; on a CPU in Triton's interpreter.
GPU = "cuda" if torch.cuda.is_available() else "cpu"


NEEDS_CPU_KERNELS = pytest.mark.skipif(
    LIBRARY.why_unusable() is not None, reason=f"backend cpu: {LIBRARY.why_unusable()}"
)


class SdpaOneQueryAProduct(SdpaAttention):
    """What `sdpa` does with bfloat16 on processors with AMX."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._one_query_a_product = True


class TestReference(AttentionBackendTests):
    backend = ReferenceAttention


class TestSdpa(AttentionBackendTests):
    backend = SdpaAttention


class TestSdpaOneQueryAProduct(AttentionBackendTests):
    backend = SdpaOneQueryAProduct


@NEEDS_CPU_KERNELS
class TestCpu(AttentionBackendTests):
    backend = CpuAttention


class TestTriton(AttentionBackendTests):
    """A few small cases: in the interpreter, a launch takes milliseconds a program."""

    backend = TritonAttention
    device = GPU
    profile = Profile(name="few", seconds=10, examples=24, longest=20, shrink_s=0, least=4)
    specs = (
        make_spec(device=GPU),
        make_spec(device=GPU, dtype="bfloat16", sliding_window=5, sinks=True),
        make_spec(device=GPU, dtype="float16", logit_softcap=2.0, num_heads=3, num_kv_heads=1),
    )


KINDS = [
    ReferenceAttention,
    SdpaAttention,
    SdpaOneQueryAProduct,
    TritonAttention,
    pytest.param(CpuAttention, marks=NEEDS_CPU_KERNELS),
]
WITH_TRITON = pytest.mark.parametrize("backend", KINDS)


def device_of(backend: type[AttentionBackend]) -> str:
    return GPU if backend is TritonAttention else "cpu"


@WITH_TRITON
def test_long_prompts_and_many_sequences_are_within_the_bound(
    backend: type[AttentionBackend],
) -> None:
    lengths = (*((1, 100 + 11 * i) for i in range(12)), (200, 200), (57, 240))
    dims, device = {"head_dim": 64, "value_head_dim": 64}, device_of(backend)
    case = Case(spec=make_spec(dtype="bfloat16", device=device, **dims), lengths=lengths)
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(backend, case, inputs).out)


def test_reference_subtracts_alibi_by_distance() -> None:
    spec = make_spec(alibi=True, num_heads=2, num_kv_heads=1)
    case = Case(spec=spec, lengths=((3, 6),))
    inputs = make_inputs(case)
    slopes = torch.tensor([0.5, 0.25])
    made = ReferenceAttention(spec, None, {})
    cache = torch.zeros(9, *ReferenceAttention.kv_layout(spec).block_shape)
    batch = make_batch([(0, 6)], [[2, 1]], 4)
    layer = Layer(alibi_slopes=slopes)
    out = torch.empty(6, 2, 16)
    q = inputs.q[0].repeat(2, 1, 1)

    plan = made.plan(batch, 0)
    made.write(layer, inputs.k[0], inputs.v[0], cache, plan)
    made.attend(layer, q, inputs.k[0], inputs.v[0], cache, plan, out)

    scores = torch.einsum("qhd,kd->hqk", q, inputs.k[0][:, 0]) * spec.scale
    for i in range(6):
        for j in range(6):
            bias = -slopes * (i - j) if j <= i else torch.tensor(float("-inf"))
            scores[:, i, j] += bias
    want = torch.einsum("hqk,kd->qhd", scores.softmax(-1), inputs.v[0][:, 0])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    "backend",
    [
        ReferenceAttention,
        SdpaAttention,
        SdpaOneQueryAProduct,
        TritonAttention,
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 9, "num_kv_heads": 2},
        {"dtype": "bfloat16", "kv_dtype": "float8_e5m2", "num_kv_heads": 4},
    ],
    ids=["grouped", "window", "quantized cache"],
)
def test_alibi_is_within_the_bound(
    backend: type[AttentionBackend], changes: dict[str, Any]
) -> None:
    """Equal and ragged lengths, one token and more, behind a prefix and without one."""
    spec = make_spec(**{"num_heads": 4, "num_kv_heads": 1, **changes}, alibi=True)
    spec = attrs.evolve(spec, device=device_of(backend))
    for lengths in (((1, 23), (1, 23)), ((1, 5), (1, 40), (7, 7), (5, 21))):
        case = Case(spec=spec, lengths=lengths)
        inputs = make_inputs(case)
        assert backend.why_unsupported(spec) is None

        check_within_bound(case, inputs, run(backend, case, inputs).out)


REFUSED = {
    "latent attention": {"latent": object()},
    "logit soft cap": {"logit_softcap": 30.0},
    "attention sinks": {"sinks": True},
    "batch invariance": {"batch_invariant": True},
    "KV cache in another dtype": {"kv_dtype": "float16"},
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED.keys())
def test_sdpa_says_what_it_cannot_do(words: str, change: dict[str, object]) -> None:
    reason = SdpaAttention.why_unsupported(make_spec(**change))

    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("words", "change"),
    [("int8", {"kv_dtype": "int8"})],
)
def test_reference_says_what_it_cannot_do(words: str, change: dict[str, object]) -> None:
    reason = ReferenceAttention.why_unsupported(make_spec(**change))

    assert reason is not None
    assert words in reason


def test_dense_attention_agrees_with_pytorch_where_both_apply() -> None:
    case = Case(spec=make_spec(num_heads=2), lengths=((9, 9),))
    inputs = make_inputs(case)

    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.q[0].double().transpose(0, 1),
        inputs.k[0].double().transpose(0, 1),
        inputs.v[0].double().transpose(0, 1),
        is_causal=True,
        scale=case.spec.scale,
    )

    torch.testing.assert_close(attention(case, inputs, torch.float64)[0], want.transpose(0, 1))
