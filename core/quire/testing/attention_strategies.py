"""Hypothesis strategies: cases of a step, of what a backend says that it can serve."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from hypothesis import strategies as st

from quire.errors import PluginError
from quire.interfaces.attention import (
    QUANTIZED_KV_DTYPES,
    AttentionBackend,
    AttentionSpec,
    LatentSpec,
    why_refused,
)
from quire.testing.attention_cases import Case, make_spec
from quire.testing.attention_run import Subject
from quire.testing.kit_report import Profile

# (num_kv_heads, heads that share one): groups of 1 to 16.
HEADS = [(2, 2), (1, 1), (3, 1), (2, 1), (2, 3), (1, 4), (3, 2), (2, 5), (1, 7), (2, 8), (1, 16)]
HEADS += [(9, 4)]
HEAD_DIMS = [16, 64, 8, 20, 32, 80, 96, 128, 192, 256]
BLOCK_SIZES = [4, 16, 1, 2, 8, 32, 64, 128, 256]
LONG_WINDOW = 129
WINDOWS = [1, 2, 3, 5, 9, 16, 17, 40, LONG_WINDOW, 1000]
# Dimensions of a head where cases are small.
MOST_DIMS = 64
# exp(120) is infinite in float32, exp(-150) zero.
SHIFTS = [0.0, 0.0, 0.0, -150.0, 120.0]
DTYPES = ["float32", "bfloat16", "float16"]
# (heads, compressed numbers, rotated numbers) of latents.
LATENTS = [(4, 32, 8), (1, 16, 16), (16, 64, 32), (5, 24, 6), (20, 16, 4), (72, 16, 8)]
# Sizes of models, for kernels that have no others.
MODELS_LATENTS = [(16, 512, 64), (128, 512, 64)]
# What a backend may have been made for alone.
DEMANDS: list[dict[str, Any]] = [
    *({"num_heads": kv * group, "num_kv_heads": kv} for kv, group in HEADS[1:]),
    {"sinks": True},
    {"sliding_window": 9},
    {"alibi": True},
    {"logit_softcap": 30.0},
    *({"kv_dtype": name} for name in QUANTIZED_KV_DTYPES),
    {"causal": False},
]


@attrs.frozen(kw_only=True)
class Choices:
    """What a backend serves: one specification, and the values that may each be put into it."""

    backend: type[AttentionBackend]
    options: Mapping[str, Any]
    plain: AttentionSpec
    changes: dict[str, list[dict[str, Any]]]


def _refused(backend: type[AttentionBackend], spec: AttentionSpec) -> str | None:
    """Return why a backend does not serve a specification.

    Raises: PluginError for another answer than a sentence or None.
    """
    reason = why_refused(backend, spec)
    if reason is None or (isinstance(reason, str) and reason):
        return reason
    raise PluginError(
        f"{backend.__name__}.why_unsupported returns {reason!r}; it returns None for what the "
        "backend serves, else the reason in a sentence."
    )


def choices_of(subject: Subject, device: str) -> Choices | str:
    """Ask a backend what it serves on a device; a sentence says why it is nothing."""
    backend, reason = subject.backend, "it was not asked"
    for dtype, dim, size in itertools.product(DTYPES, HEAD_DIMS, BLOCK_SIZES):
        plain = _spec(dtype=dtype, head_dim=dim, value_head_dim=dim, block_size=size, device=device)
        found = _refused(backend, plain)
        if found is None:
            return _choices(subject, plain)
        reason = found
    # Some serve latents and nothing else.
    latents = [*_latents(), *_latents(MODELS_LATENTS)]
    for dtype, latent, size in itertools.product(DTYPES, latents, BLOCK_SIZES):
        sizes = {"dtype": dtype, "block_size": size, "device": device}
        plain = make_spec(**{**latent, **sizes})
        if _refused(backend, plain) is None:
            return _choices(subject, plain)
    for demand, dtype in itertools.product(DEMANDS, DTYPES):
        for dim, size in itertools.product(HEAD_DIMS, BLOCK_SIZES):
            shape = {"dtype": dtype, "head_dim": dim, "value_head_dim": dim, "block_size": size}
            plain = _spec(**{**shape, "kv_dtype": dtype, **demand}, device=device)
            if _refused(backend, plain) is None:
                return _choices(subject, plain)
    return reason


def _choices(subject: Subject, plain: AttentionSpec) -> Choices:
    changes = _served(subject.backend, plain)
    return Choices(backend=subject.backend, options=subject.options, plain=plain, changes=changes)


def _latents(sizes: Sequence[tuple[int, int, int]] = LATENTS) -> list[dict[str, Any]]:
    """Return changes of a specification to latent attention."""
    return [
        {
            "num_heads": heads,
            "num_kv_heads": 1,
            "head_dim": rank + rope,
            "value_head_dim": rank,
            "latent": LatentSpec(
                kv_lora_rank=rank, rope_head_dim=rope, nope_head_dim=2 * rope, v_head_dim=2 * rope
            ),
            "scale": (3 * rope) ** -0.5 / 2,
        }
        for heads, rank, rope in sizes
    ]


def _spec(**changes: Any) -> AttentionSpec:
    return make_spec(scale=changes["head_dim"] ** -0.5, **changes)


def _served(backend: type[AttentionBackend], plain: AttentionSpec) -> dict[str, list[Any]]:
    """Return the changes of each kind that the backend accepts, the plainest first."""
    asked: dict[str, list[dict[str, Any]]] = {
        "dtype": [{"dtype": name, "kv_dtype": name} for name in DTYPES],
        # Behind the dtype, which says what an unquantized cache holds.
        "quantized_kv": [{}, {}, *({"kv_dtype": name} for name in QUANTIZED_KV_DTYPES)],
        "heads": [{"num_heads": kv * group, "num_kv_heads": kv} for kv, group in HEADS],
        "head_dim": [
            {"head_dim": dim, "value_head_dim": dim, "scale": dim**-0.5} for dim in HEAD_DIMS
        ],
        "value_head_dim": [{}, {}, {"value_head_dim": 24}, {"value_head_dim": 8}],
        "block_size": [{"block_size": size} for size in BLOCK_SIZES],
        "scale": [{}, {"scale": 0.5}, {"scale": 0.07}],
        "window": [{}, *({"sliding_window": n} for n in WINDOWS)],
        "softcap": [{}, {}, {"logit_softcap": 1.5}, {"logit_softcap": 30.0}],
        "sinks": [{}, {"sinks": True}],
        "alibi": [{}, {}, {"alibi": True}],
        # Behind all that it takes the place of.
        "latent": [*[{}] * 12, *_latents()],
    }
    if plain.has_quantized_kv:
        asked["dtype"] = [{"dtype": name} for name in DTYPES]
    if plain.latent is not None:
        asked |= {"heads": [{}], "head_dim": [{}], "value_head_dim": [{}], "latent": _latents()}
    return {
        name: [c for c in changes if _refused(backend, attrs.evolve(plain, **c)) is None]
        for name, changes in asked.items()
    }


def specs(choices: Choices, small: bool = False) -> st.SearchStrategy[AttentionSpec]:
    """Draw what a model may ask for and the backend serves."""
    parts = []
    for name, served in choices.changes.items():
        if name == "latent" and not any(served):
            continue  # what has none is drawn the same cases as before there were any
        if small and name == "head_dim":
            served = [change for change in served if change.get("head_dim", 0) <= MOST_DIMS]
        one = st.sampled_from(served or [{}])
        if name == "window" and len(served) > 1:
            one = st.one_of(st.just({}), one)
        parts.append(one)

    def made(drawn: tuple[dict[str, Any], ...]) -> AttentionSpec:
        changes = {key: value for change in drawn for key, value in change.items()}
        if changes.get("latent", choices.plain.latent) is not None:
            changes["kv_dtype"] = changes.get("dtype", choices.plain.dtype)
        spec = attrs.evolve(choices.plain, **changes)
        # What it serves one by one it need not serve together.
        return spec if _refused(choices.backend, spec) is None else choices.plain

    return st.tuples(*parts).map(made)


@functools.cache
def _lengths(block_size: int, longest: int) -> st.SearchStrategy[int]:
    """Draw small lengths, block edges with one more and one less, and anything."""
    edges = st.builds(
        lambda blocks, more: min(longest, max(1, blocks * block_size + more)),
        st.integers(1, max(1, longest // block_size)),
        st.integers(-1, 1),
    )
    return st.one_of(st.integers(1, min(9, longest)), edges, st.integers(1, longest))


@functools.cache
@st.composite
def batches(
    draw: st.DrawFn,
    block_size: int = 4,
    longest: int = 70,
    most: int = 5,
    single: bool = False,
) -> tuple[tuple[int, int], ...]:
    """Draw (query length, length) pairs: decodes first, then chunks and whole prompts."""
    lengths = _lengths(block_size, longest)
    pairs = []
    for _ in range(draw(st.integers(1, most))):
        seq_len = draw(lengths)
        whole = st.just(seq_len)
        query_lens = st.one_of(st.just(1), whole, st.integers(1, seq_len))
        pairs.append((1 if single else draw(query_lens), seq_len))
    return tuple(sorted(pairs, key=lambda pair: pair[0] > 1))


@st.composite
def cases(
    draw: st.DrawFn,
    spec_strategy: st.SearchStrategy[AttentionSpec],
    longest: int,
    single: bool = False,
) -> Case:
    """Draw a case; `single`: each sequence has one token, and padding rows may follow."""
    spec = draw(spec_strategy)
    lengths = draw(batches(spec.block_size, longest, single=single))
    return Case(
        spec=spec,
        lengths=lengths,
        seed=draw(st.integers(0, 999)),
        shared_blocks=draw(st.sampled_from([0, 0, 1, 2])),
        strided=draw(st.booleans()),
        padding=draw(st.integers(0, 4)) if single else 0,
        poison=draw(st.sampled_from(["nan", "nan", "large"])),
        shift=draw(st.sampled_from(SHIFTS)),
        groups_before=draw(st.sampled_from([0, 0, 1, 2])),
        spare_columns=draw(st.sampled_from([0, 0, 1, 3])),
        moved=draw(st.sampled_from([False, False, True])),
    )


def first_cases(choices: Choices, profile: Profile) -> list[Case]:
    """Return a case of each change that is served, by itself: what is drawn may leave some out."""
    found: list[AttentionSpec] = []
    for name, served in choices.changes.items():
        for change in served:
            is_large = (
                profile.small and name == "head_dim" and change.get("head_dim", 0) > MOST_DIMS
            )
            spec = attrs.evolve(choices.plain, **change)
            if spec not in found and not is_large:
                found.append(spec)
    return [Case(spec=spec, lengths=_first_lengths(spec, profile.longest)) for spec in found]


def _first_lengths(spec: AttentionSpec, longest: int) -> tuple[tuple[int, int], ...]:
    size = spec.block_size
    pairs = [(1, 7), (1, 2 * size), (6, size + 5), (9, 9)]
    return tuple((min(n, longest), min(length, longest)) for n, length in pairs)


# Changes of a specification that change the work.
SHAPES = ("heads", "head_dim", "value_head_dim", "block_size", "latent")


def without_shapes(choices: Choices) -> Choices:
    """Return choices among specifications of the plain one's shape."""
    kept = {name: served for name, served in choices.changes.items() if name not in SHAPES}
    return attrs.evolve(choices, changes=kept)


@st.composite
def long_cases(draw: st.DrawFn, choices: Choices, longest: int, query_lens: Sequence[int]) -> Case:
    """Draw a case of thousands of keys, in 16 bits: of float32 sums that long say little."""
    changes = {**choices.changes, "dtype": [c for c in choices.changes["dtype"] if _is_short(c)]}
    # Windows that fit into a tile say little here.
    windows = [c for c in choices.changes["window"] if c.get("sliding_window", 99) > 64]
    changes["window"] = windows or choices.changes["window"]
    spec = draw(specs(attrs.evolve(choices, changes=changes), small=True))
    fewest = 1000 // spec.block_size + 1
    edges = st.integers(fewest, max(fewest, longest // spec.block_size - 1))
    near = st.builds(lambda n, more: n * spec.block_size + more, edges, st.integers(-1, 1))
    pairs = list(draw(batches(spec.block_size, 9, most=2))) if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3)) if len(query_lens) > 1 else 1):
        seq_len = draw(st.one_of(near, st.integers(1000, longest)))
        pairs.append((draw(st.sampled_from(query_lens)), seq_len))
    lengths = tuple(sorted(pairs, key=lambda pair: pair[0] > 1))
    return Case(spec=spec, lengths=lengths, seed=draw(st.integers(0, 999)))


def first_long_cases(choices: Choices, longest: int) -> list[Case]:
    """Return a case of many keys without a window, and one with a window beyond a tile's width."""
    short = [change for change in choices.changes["dtype"] if _is_short(change)]
    found = []
    for window in ({}, {"sliding_window": LONG_WINDOW}):
        spec = attrs.evolve(choices.plain, **{**short[0], **window})
        if _refused(choices.backend, spec) is None:
            found.append(Case(spec=spec, lengths=((1, longest - 3), (1, 5))))
    return found


@st.composite
def prompt_cases(draw: st.DrawFn, choices: Choices, shortest: int, longest: int) -> Case:
    """Draw a case of a long chunk, of more rows than a tile has, and of others beside it."""
    spec = draw(specs(without_shapes(choices), small=True))
    edges = st.sampled_from([n for n in (64, 65, 128, 129, 512, 1024, 1025) if n >= shortest])
    chunks = st.one_of(st.integers(shortest, longest), edges.map(lambda n: min(n, longest)))
    own = draw(chunks)
    pairs = [*draw(batches(spec.block_size, 40, most=2)), (own, own + draw(st.integers(0, 100)))]
    lengths = tuple(sorted(pairs, key=lambda pair: pair[0] > 1))
    return Case(spec=spec, lengths=lengths, seed=draw(st.integers(0, 999)))


@st.composite
def crowded_cases(draw: st.DrawFn, choices: Choices, most: int) -> Case:
    """Draw a case of many short sequences: more than a warp, or a block of threads, has lanes."""
    spec = draw(specs(choices, small=True))
    edges = [n for n in (33, 65, 17, 129, 257) if n <= most]
    rest = draw(st.one_of(st.sampled_from(edges), st.integers(17, most))) - 1
    seed = draw(st.integers(0, 999))
    numbers = random.Random(seed)
    longest = most // 4
    lengths = [(1, numbers.randint(1, longest)) for _ in range(rest)]
    lengths += draw(batches(spec.block_size, longest, most=2))
    ordered = tuple(sorted(lengths, key=lambda pair: pair[0] > 1))
    return Case(spec=spec, lengths=ordered, seed=seed)


def why_not_long(choices: Choices) -> str | None:
    """Return why cases of thousands of keys are not drawn."""
    has = any(_is_short(change) for change in choices.changes.get("dtype", []))
    return None if has else "it serves no 16-bit dtype here"


def _is_short(change: Mapping[str, Any]) -> bool:
    return change.get("dtype") in ("bfloat16", "float16")


def given_specs(found: Sequence[AttentionSpec]) -> st.SearchStrategy[AttentionSpec]:
    """Draw one of the specifications of a test."""
    return st.sampled_from(list(found))
