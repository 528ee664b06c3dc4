"""Each backend against a dense float64 attention, on poisoned caches."""

from typing import Any

import pytest
import torch
from attention_cases import GPU, Case, Inputs, Layer, make_batch, make_inputs, make_spec, run
from attention_strategies import batches, specs
from dense_attention import attention, check_within_bound
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from quire.interfaces.attention import AttentionBackend
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.sdpa.backend import SdpaAttention
from quire_attention.triton.backend import TritonAttention


class SdpaOneQueryAProduct(SdpaAttention):
    """What `sdpa` does with bfloat16 on processors with AMX."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._one_query_a_product = True


KINDS = [ReferenceAttention, SdpaAttention, SdpaOneQueryAProduct]
BACKENDS = pytest.mark.parametrize("backend", KINDS)
# `triton` too, where one batch is enough: its interpreter is slow. test_triton.py has the rest.
WITH_TRITON = pytest.mark.parametrize("backend", [*KINDS, TritonAttention])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
# Rounding is a matter of luck, so the examples are always the same ones: never a rerun.
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much],
)


def device_of(backend: type[AttentionBackend]) -> str:
    return GPU if backend is TritonAttention else "cpu"


@BACKENDS
@DTYPES
@given(st.data())
@QUICK
def test_output_is_within_the_bound_and_no_hidden_slot_is_read(
    backend: type[AttentionBackend], dtype: str, data: st.DataObject
) -> None:
    spec = data.draw(specs(dtype))
    assume(backend.why_unsupported(spec) is None)
    case = Case(spec=spec, lengths=data.draw(batches()), seed=data.draw(st.integers(0, 999)))
    inputs = make_inputs(case)

    done = run(backend, case, inputs)

    check_within_bound(case, inputs, done.out)


@BACKENDS
@given(batches(), st.sampled_from([1, 4, 16]), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_only_the_slots_of_the_step_are_written(
    backend: type[AttentionBackend], lengths: tuple[tuple[int, int], ...], size: int, seed: int
) -> None:
    case = Case(spec=make_spec(block_size=size), lengths=lengths, seed=seed)

    done = run(backend, case, make_inputs(case))

    blocks = torch.unique(done.slots // size)
    others = torch.ones(len(done.after), dtype=torch.bool).index_fill_(0, blocks, False)
    before, after = done.before.view(torch.int32), done.after.view(torch.int32)
    assert torch.equal(after[others], before[others])
    changed = (after != before).flatten(1).any(dim=1).nonzero().flatten()
    assert changed.tolist() == blocks.tolist()
    # A token is so many numbers, wherever the layout puts them.
    per_token = case.spec.num_kv_heads * (case.spec.head_dim + case.spec.value_head_dim)
    assert (after != before).sum() == len(done.slots) * per_token


@WITH_TRITON
@pytest.mark.parametrize("lengths", [((1, 7), (1, 30), (1, 3)), ((1, 5), (4, 9), (6, 6))])
def test_nan_in_one_sequence_does_not_reach_the_others(
    backend: type[AttentionBackend], lengths: tuple[tuple[int, int], ...]
) -> None:
    case = Case(spec=make_spec(device=device_of(backend)), lengths=lengths)
    inputs = make_inputs(case)
    clean = run(backend, case, inputs).out
    inputs.k[1][0] = inputs.v[1][0] = float("nan")

    found = run(backend, case, inputs).out

    assert found[1].isnan().any()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2], clean[2])


@BACKENDS
@pytest.mark.parametrize("causal", [True, False])
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_encoder_attends_to_its_own_keys_without_a_cache(
    backend: type[AttentionBackend], causal: bool, lengths: list[int]
) -> None:
    pairs = tuple((n, n) for n in sorted(lengths, key=lambda n: n > 1))
    case = Case(spec=make_spec(causal=causal), lengths=pairs)
    inputs = make_inputs(case)
    made = backend(case.spec, None, {})
    tables = [[1 + i] * 8 for i in range(len(pairs))]
    batch = make_batch([(0, n) for n, _ in pairs], tables, 4)
    out = torch.full((sum(lengths), 4, 16), float("nan"))

    plan = made.plan(batch, 0)
    q, k, v = torch.cat(inputs.q), torch.cat(inputs.k), torch.cat(inputs.v)
    made.attend(Layer(), q, k, v, None, plan, out)

    check_within_bound(case, inputs, list(out.split(batch.query_lens)))


@BACKENDS
def test_bidirectional_attention_sees_later_tokens(backend: type[AttentionBackend]) -> None:
    case = Case(spec=make_spec(causal=False), lengths=((1, 4), (3, 9), (6, 6)))
    inputs = make_inputs(case)

    done = run(backend, case, inputs)

    check_within_bound(case, inputs, done.out)


@WITH_TRITON
def test_long_prompts_and_many_sequences_are_within_the_bound(
    backend: type[AttentionBackend],
) -> None:
    lengths = (*((1, 100 + 11 * i) for i in range(12)), (200, 200), (57, 240))
    dims, device = {"head_dim": 64, "value_head_dim": 64}, device_of(backend)
    case = Case(spec=make_spec(dtype="bfloat16", device=device, **dims), lengths=lengths)
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(backend, case, inputs).out)


def test_reference_gives_the_same_bits_alone_and_in_a_batch() -> None:
    assert ReferenceAttention.batch_invariant
    case = Case(spec=make_spec(), lengths=((1, 30), (1, 7), (5, 12), (9, 9)))
    inputs = make_inputs(case)
    together = run(ReferenceAttention, case, inputs).out

    for i, lengths in enumerate(case.lengths):
        own = Inputs(q=[inputs.q[i]], k=[inputs.k[i]], v=[inputs.v[i]], sinks=None)
        alone = run(ReferenceAttention, Case(spec=case.spec, lengths=(lengths,)), own).out[0]
        assert torch.equal(alone, together[i])


@given(batches())
@settings(max_examples=20, deadline=None)
def test_reference_gives_the_log_sum_exp_of_the_scores(
    lengths: tuple[tuple[int, int], ...],
) -> None:
    case = Case(spec=make_spec(), lengths=lengths)
    inputs = make_inputs(case)

    done = run(ReferenceAttention, case, inputs, wants_lse=True)

    ones = Inputs(q=inputs.q, k=inputs.k, v=inputs.v, sinks=None)
    want = torch.cat([log_sum for log_sum in log_sums(case, ones)])
    assert done.lse is not None
    torch.testing.assert_close(done.lse.double(), want, rtol=1e-6, atol=1e-6)


def log_sums(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """Return log sum exp of each query's scores [queries, heads], from the softmax's weights."""
    from dense_attention import scores_of

    return [
        scores_of(case, inputs, i, torch.float64).logsumexp(-1).T for i in range(len(case.lengths))
    ]


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


REFUSED = {
    "latent attention": {"latent": object()},
    "logit soft cap": {"logit_softcap": 30.0},
    "attention sinks": {"sinks": True},
    "ALiBi": {"alibi": True},
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
    [("latent", {"latent": object()}), ("float8_e4m3fn", {"kv_dtype": "float8_e4m3fn"})],
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
