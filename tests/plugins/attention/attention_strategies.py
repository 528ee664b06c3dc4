"""Hypothesis strategies: batches of a step, and what models ask of attention."""

from attention_cases import make_spec
from hypothesis import strategies as st

from quire.interfaces.attention import AttentionSpec


@st.composite
def batches(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Draw (query length, length) pairs: decodes first, then chunks and whole prompts."""
    pairs = []
    for _ in range(draw(st.integers(1, 5))):
        seq_len = draw(st.one_of(st.integers(1, 9), st.integers(1, 70)))
        query_len = draw(st.one_of(st.just(1), st.just(seq_len), st.integers(1, seq_len)))
        pairs.append((query_len, seq_len))
    return tuple(sorted(pairs, key=lambda pair: pair[0] > 1))


@st.composite
def specs(draw: st.DrawFn, dtype: str) -> AttentionSpec:
    """Draw what a model may ask for."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([8, 20, 64, 96]))
    return make_spec(
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 8])),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=draw(st.sampled_from([head_dim, 16])),
        scale=draw(st.sampled_from([head_dim**-0.5, 0.5])),
        dtype=dtype,
        block_size=draw(st.sampled_from([1, 2, 4, 8, 16, 32])),
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 40))),
        logit_softcap=draw(st.sampled_from([None, None, 3.0])),
        sinks=draw(st.booleans()),
    )
