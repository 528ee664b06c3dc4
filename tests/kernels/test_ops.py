"""Each operation against its formula in float64, and Philox against the published vectors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire_kernels import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SHAPES = [(1, 8), (3, 64), (7, 100), (32, 1024)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(out: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Fail unless the error is at most twice plain PyTorch's, plus one rounding unit."""
    assert out.dtype is plain.dtype
    unit = torch.finfo(out.dtype).eps * exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + unit
    assert (out.double() - exact).abs().max() <= allowed


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_within_the_bound(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype), draw(shape[1], dtype=dtype, seed=1)

    out = ops.rms_norm(x, weight, 1e-5)

    check(out, norm_formula(x.double(), weight.double(), 1e-5), norm_formula(x, weight, 1e-5))


@DTYPES
def test_rms_norm_takes_heads_that_lie_apart(dtype: torch.dtype) -> None:
    heads = draw(5, 6, 16, dtype=dtype)[:, 1:4]
    weight = draw(16, dtype=dtype, seed=1)

    out = ops.rms_norm(heads, weight, 1e-6)

    assert torch.equal(out, ops.rms_norm(heads.contiguous(), weight, 1e-6))


def test_rms_norm_of_zeros_is_zero_and_of_large_numbers_finite() -> None:
    weight = torch.ones(8, dtype=torch.bfloat16)

    assert ops.rms_norm(torch.zeros(2, 8, dtype=torch.bfloat16), weight, 1e-6).eq(0).all()
    # The square of 1e20 exceeds bfloat16's steps, not its range, but float16's by far.
    large = torch.full((2, 8), 6e4, dtype=torch.float16)
    assert ops.rms_norm(large, weight.half(), 1e-6).sub(1).abs().max() < 1e-2


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_is_the_norm_of_the_sum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2)
    weight = draw(shape[1], dtype=dtype, seed=1)
    kept = residual.clone()
    total = x + residual

    out, found = ops.add_rms_norm(x, residual, weight, 1e-5)

    assert torch.equal(found, total)
    assert torch.equal(residual, kept)
    exact = norm_formula(total.double(), weight.double(), 1e-5)
    check(out, exact, norm_formula(total, weight, 1e-5))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul_takes_the_gate_first(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = draw(*shape, dtype=dtype) * 3
    gate, up = gate_up.chunk(2, dim=-1)

    out = ops.silu_mul(gate_up.clone())

    exact = gate.double() * gate.double().sigmoid() * up.double()
    check(out, exact, gate * gate.sigmoid() * up)


def test_silu_mul_leaves_its_input_alone() -> None:
    gate_up = draw(4, 16)
    kept = gate_up.clone()

    ops.silu_mul(gate_up)

    assert torch.equal(gate_up, kept)


def test_gather_rows_takes_rows_in_the_order_given() -> None:
    x = draw(6, 3)

    out = ops.gather_rows(x, torch.tensor([4, 0, 4], dtype=torch.int32))

    assert torch.equal(out, torch.stack([x[4], x[0], x[4]]))


# Source: kat_vectors of Random123 (Salmon et al.), philox 4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize(
    ("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys()
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = tuple(torch.tensor([word]) for word in counter)
    seed = key[0] | key[1] << 32
    signed = seed - 2**64 if seed >= 2**63 else seed

    lanes = ops.philox_4x32(words, torch.tensor([signed]))  # type: ignore[arg-type]

    assert tuple(int(lane) for lane in lanes) == answer


def plain_philox(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 in Python's whole numbers."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def plain_noise(seed: int, child: int, position: int, at: int, stage: int = 0) -> float:
    """The definition in `quire.interfaces.sampling.Sampler`, one token or group at a time."""
    lane = plain_philox([at // 4, position, child, stage], seed)[at % 4]
    v = (lane + 0.5) / 2**32
    return -math.log(-math.log1p(-v))


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 127),
    st.integers(0, 2**31 - 1),
    st.sampled_from([1, 2, 3, 4, 5, 17]),
)
@settings(max_examples=60, deadline=None)
def test_gumbel_noise_follows_its_definition(
    seed: int, child: int, position: int, vocab_size: int
) -> None:
    def row(value: int) -> Tensor:
        return torch.tensor([value])

    noise = ops.gumbel_noise(row(seed), row(child), row(position), vocab_size)

    assert noise.shape == (1, vocab_size)
    assert noise.dtype is torch.float32
    want = [plain_noise(seed % 2**64, child, position, t) for t in range(vocab_size)]
    torch.testing.assert_close(noise[0].double(), torch.tensor(want).double(), rtol=1e-4, atol=1e-4)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**31 - 1),
    st.sampled_from([1, 63, 64, 65, 200]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_draw_takes_a_group_and_then_a_token(
    seed: int, position: int, vocab_size: int, logits_seed: int
) -> None:
    generator = torch.Generator().manual_seed(logits_seed)
    scores = torch.randn(1, vocab_size, generator=generator) * 3
    scores[torch.rand(scores.shape, generator=generator) < 0.3] = -math.inf
    scores[0, logits_seed % vocab_size] = 1.0
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])

    token = ops.draw(scores, signed, torch.tensor([3]), torch.tensor([position])).item()

    groups = scores[0].double().split(64)
    of_group = [plain_noise(seed, 3, position, g, 1) for g in range(len(groups))]
    masses = [float(group.logsumexp(0)) + x for group, x in zip(groups, of_group, strict=True)]
    best = max(range(len(groups)), key=lambda g: masses[g])
    tokens = range(64 * best, min(64 * best + 64, vocab_size))
    assert token == max(
        tokens, key=lambda t: scores[0, t].item() + plain_noise(seed, 3, position, t)
    )


def test_draws_over_many_groups_follow_the_distribution() -> None:
    scores = torch.linspace(-3.0, 2.0, 300).roll(77)
    scores[:70] = -math.inf
    positions = torch.arange(100_000)

    tokens = ops.draw(scores.expand(100_000, -1), positions * 0 + 5, positions * 0, positions)

    expected = scores.softmax(0)[70:] * 100_000
    counts = torch.bincount(tokens, minlength=300)
    assert counts[:70].sum() == 0
    # Chi-square with 229 degrees of freedom exceeds 350 less than once in a million.
    assert ((counts[70:] - expected).square() / expected).sum().item() < 350


def test_gumbel_noise_of_a_row_does_not_depend_on_the_others() -> None:
    seeds = torch.tensor([5, -3, 2**62, 5])
    children = torch.tensor([0, 1, 2, 0])
    positions = torch.tensor([9, 9, 100, 10])

    together = ops.gumbel_noise(seeds, children, positions, 33)

    for i in range(4):
        one = slice(i, i + 1)
        alone = ops.gumbel_noise(seeds[one], children[one], positions[one], 33)
        assert torch.equal(alone[0], together[i])
    assert len({tuple(row.tolist()) for row in together}) == 4


@pytest.mark.parametrize("lane", [0, 1, 2**31, 2**32 - 2, 2**32 - 1])
def test_gumbel_noise_is_finite_for_every_random_number(
    lane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_equal(counter: tuple[Tensor, ...], seed: Tensor) -> list[Tensor]:
        shape = torch.broadcast_shapes(*(word.shape for word in counter), seed.shape)
        return [torch.full(shape, lane)] * 4

    monkeypatch.setattr(ops, "philox_4x32", all_equal)
    zero = torch.tensor([0])

    noise = ops.gumbel_noise(zero, zero, zero, 6)

    assert noise.isfinite().all()
    want = -math.log(-math.log1p(-(lane + 0.5) / 2**32))
    assert noise[0, 0].item() == pytest.approx(want, rel=1e-4, abs=0.4 if lane > 2**31 else 1e-4)


def test_gumbel_noise_has_the_mean_and_variance_of_gumbel() -> None:
    rows = torch.arange(100)

    noise = ops.gumbel_noise(rows, rows * 0, rows * 0 + 7, 2000)

    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_ops_import_without_triton_and_do_not_load_it() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import quire_kernels\n"
        "assert 'torch' not in sys.modules; import quire_kernels.ops"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
