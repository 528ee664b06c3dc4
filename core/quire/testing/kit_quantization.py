"""The kit's doors to quantization methods: a function, a class to subclass in pytest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from attrs import evolve, frozen
from hypothesis import strategies as st
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.quantization import (
    EncodedWeight,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
)
from quire.testing import fused_product_checks as fused
from quire.testing import quantization_checks as checks
from quire.testing import search
from quire.testing.kit_report import CheckResult, Failure, Profile, Report, profile_of
from quire.testing.quantization_bits import check_batch_invariance
from quire.testing.quantization_cases import (
    UNUSUAL,
    LayerCase,
    QuantizationSubject,
    make_layer,
    spec_of,
)

__all__ = ["QuantizationMethodTests", "QuantizationSubject", "check_quantization"]

DTYPES = ["float32", "bfloat16", "float16"]
IN_FEATURES = [48, 64, 128, 16, 7, 33, 1, 256, 100, 512, 1024]
OUT_FEATURES = [24, 8, 64, 128, 16, 5, 1, 33, 256, 512]
ROWS = [1, 2, 33, 16, 0]
SMALL = 256
_MANY_ROWS = 130


@frozen(kw_only=True)
class Choices:
    """What a method serves: one layer, and the values that may each be put into it."""

    plain: LayerCase
    in_features: list[int]
    sizes: list[int]
    dtypes: list[str]
    kinds: list[str]


def _is_served(subject: QuantizationSubject, case: LayerCase) -> bool:
    method, spec = subject.make(), spec_of(case, subject.device)
    return method.why_unsupported(spec) is None and method.method_for(spec) is not None


def _choices(subject: QuantizationSubject, small: bool) -> Choices | str:
    """Ask a method what it serves; a sentence says why it is nothing."""
    reason: str | None = "it was not asked"
    largest = SMALL if small else 10**6
    for dtype, width, size in itertools.product(DTYPES, IN_FEATURES, OUT_FEATURES):
        plain = LayerCase(in_features=width, sizes=(size,), dtype=dtype)
        reason = subject.make().why_unsupported(spec_of(plain, subject.device))
        if reason is None and _is_served(subject, plain):
            break
    else:
        return reason or "it leaves every linear layer alone"

    def served(name: str, values: Sequence[Any]) -> list[Any]:
        found = [v for v in values if _is_served(subject, evolve(plain, **{name: v}))]
        return found or [getattr(plain, name)]

    widths = [n for n in IN_FEATURES if n <= max(largest, width)]
    heights = [(n,) for n in OUT_FEATURES if n <= max(largest, size)]
    kinds = ["head", "tied head", "embedding"]
    return Choices(
        plain=plain,
        in_features=served("in_features", widths),
        sizes=[n for (n,) in served("sizes", heights)],
        dtypes=served("dtype", DTYPES),
        kinds=[kind for kind in kinds if _is_served(subject, evolve(plain, kind=kind))],
    )


@st.composite
def layer_cases(
    draw: st.DrawFn, subject: QuantizationSubject, choices: Choices, kinds: Sequence[str]
) -> LayerCase:
    """Draw a layer that the method serves."""
    kind = draw(st.sampled_from(list(kinds)))
    num_parts = draw(st.sampled_from([1, 2, 3])) if kind == "linear" else 1
    first = draw(st.sampled_from(choices.sizes))
    others = st.one_of(st.just(first), st.sampled_from(choices.sizes))
    case = LayerCase(
        kind=kind,
        in_features=draw(st.sampled_from(choices.in_features)),
        sizes=(first, *(draw(others) for _ in range(num_parts - 1))),
        bias=kind == "linear" and draw(st.booleans()),
        dtype=draw(st.sampled_from(choices.dtypes)),
        rows=draw(st.one_of(st.sampled_from(ROWS), st.integers(1, 40))),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        unusual=draw(st.sampled_from(["", *UNUSUAL])),
    )
    # What it serves one by one it need not serve together.
    return case if _is_served(subject, case) else evolve(choices.plain, kind=kind)


def _first_cases(subject: QuantizationSubject, choices: Choices) -> list[LayerCase]:
    """Return a layer of the most inputs that are served, and one with more rows than a tile has."""
    wide = [evolve(choices.plain, in_features=n, rows=3) for n in sorted(IN_FEATURES)]
    served = [case for case in wide if _is_served(subject, case)]
    return [*served[-1:], evolve(choices.plain, rows=_MANY_ROWS)]


def _why_not_invariant(subject: QuantizationSubject, choices: Choices) -> str | None:
    """Return why bits are not compared, and how they are."""
    plain = evolve(choices.plain, batch_invariant=True)
    method = subject.make().method_for(spec_of(plain, subject.device))
    if method is None or method.batch_invariant:
        return None
    tried = [evolve(choices.plain, rows=9, seed=seed) for seed in range(4)]
    try:
        same = sum(check_batch_invariance(subject, case) is None for case in tried)
    except Exception:  # noqa: BLE001 - another check tells what it raises
        return "batch_invariant is not declared"
    return f"batch_invariant is not declared; {same} of {len(tried)} batches came out bit-equal"


def _offers(subject: QuantizationSubject, choices: Choices, name: str) -> str | None:
    """Return why an optional method of the layers is not looked at."""
    method = subject.make().method_for(spec_of(choices.plain, subject.device))
    is_own = getattr(type(method), name) is not getattr(LayerMethod, name)
    if is_own and name == "apply_after_norm":
        return None if fused.offers_fused_norm(subject, choices.plain) else "not offered here"
    if is_own and name == "apply_after_silu_mul":
        return None if fused.offers_fused_gate(subject, choices.plain) else "not offered here"
    return None if is_own else "not offered"


def _needs_encode(subject: QuantizationSubject, choices: Choices) -> str | None:
    """Return what is wrong where the kit cannot make a checkpoint."""
    try:
        make_layer(subject, subject.make(), choices.plain)
    except ValueError as error:
        return str(error)
    return None


def _checks(subject: QuantizationSubject, profile: Profile) -> list[search.Check]:
    choices = _choices(subject, profile.small)
    if isinstance(choices, str):
        raise ConfigError(
            f"{subject.method.__name__} serves nothing that the kit asks for on "
            f"{subject.device}: {choices}. Give a `config` that it serves, or another device."
        )
    missing = _needs_encode(subject, choices)
    if missing is not None:
        raise ConfigError(
            f"{subject.method.__name__} wants tensors that the kit cannot make: {missing}. Give "
            f"`encode`, which returns a weight in the method's format."
        )
    linears = layer_cases(subject, choices, ["linear"])
    heads = layer_cases(subject, choices, choices.kinds[:2] or ["linear"])
    large = evolve(choices.plain, in_features=max(choices.in_features), sizes=(max(choices.sizes),))
    both = st.one_of(linears, heads)
    no_head = None if {"head", "tied head"} & set(choices.kinds) else "it leaves heads alone"

    def check(
        name: str,
        judge: Callable[[QuantizationSubject, LayerCase], Failure | None],
        cases: st.SearchStrategy[LayerCase],
        share: float,
        skipped: str | None = None,
    ) -> search.Check:
        judged = partial(judge, subject)
        return search.Check(name=name, judge=judged, cases=cases, share=share, skipped=skipped)

    no_lookup = None if choices.kinds else "it leaves embeddings and heads alone"
    not_invariant = _why_not_invariant(subject, choices)
    no_fusion = _offers(subject, choices, "apply_after_norm")
    no_gate = _offers(subject, choices, "apply_after_silu_mul")
    no_reading = _offers(subject, choices, "dequantize")
    memory = st.sampled_from([large, evolve(large, bias=True), evolve(large, seed=1)])
    product = check("product", checks.check_product, linears, 0.4)
    return [
        evolve(product, first=_first_cases(subject, choices)),
        check("weights", checks.check_weights, linears, 0.05, no_reading),
        check("heads", checks.check_product, heads, 0.1, no_head),
        check("look-ups", checks.check_lookup, heads, 0.05, no_lookup),
        check("rows apart", checks.check_rows_apart, both, 0.1),
        check("layers apart", checks.check_layers_apart, linears, 0.1),
        check("batch invariance", check_batch_invariance, linears, 0.1, not_invariant),
        check("memory", checks.check_memory, memory, 0.05),
        check("left alone", checks.check_left_alone, linears, 0.02),
        check("fused norm", fused.check_fused_norm, linears, 0.05, no_fusion),
        check("fused gate", fused.check_fused_gate, linears, 0.05, no_gate),
    ]


def iter_quantization(
    subject: QuantizationSubject, *, profile: str | Profile = "quick", seed: int = 0
) -> Iterator[CheckResult]:
    """Yield the result of each check of a method as it ends.

    Raises: ConfigError for an unknown profile, or a method that serves nothing on the device.
    """
    chosen = profile_of(profile)
    yield from search.run_all(_checks(subject, chosen), chosen, seed)


def check_quantization(
    subject: QuantizationSubject, *, profile: str | Profile = "quick", seed: int = 0
) -> Report:
    """Check a method and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile, or a method that serves nothing on the device.
    """
    report = Report(
        kind="quantization",
        name=subject.method.__name__,
        profile=profile_of(profile).name,
        device=subject.device,
        seed=seed,
        checks=[],
    )
    return search.report_of(iter_quantization(subject, profile=profile, seed=seed), report)


class QuantizationMethodTests(search.KitTests):
    """Subclass this in a test file, name the method, and pytest runs every check.

    A method that makes its weights out of a full-precision checkpoint needs no more. For one that
    reads a format give `config`, its `quantization_config`, and `encode`. Other hooks:
    `rounding`, the largest error of a weight as a fraction of its projection's largest;
    `excluded`, names of layers that `config` leaves alone. `QuantizationSubject` has more.
    """

    method: ClassVar[type[QuantizationMethod]]
    config: ClassVar[Mapping[str, Any]] = {}
    rounding: ClassVar[float | None] = None
    excluded: ClassVar[Sequence[str]] = ()

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        """Return a projection's `weight` float32 [out, in] in the format; None: as it is."""
        return self.method.encode(weight, spec)

    def rounded_input(self, x: Tensor, spec: LayerSpec) -> Tensor:
        """Return float64 what the method makes of activations `x` [rows, in]; as they are."""
        return x

    def weight_bytes(self, spec: LinearSpec) -> int | None:
        """Return the bytes that a loaded layer holds; None: at most those of its plain weight."""
        return None

    def _checks(self) -> list[search.Check]:
        own = type(self)
        is_declared = own.weight_bytes is not QuantizationMethodTests.weight_bytes
        rounds_input = own.rounded_input is not QuantizationMethodTests.rounded_input
        subject = QuantizationSubject(
            method=self.method,
            config=self.config or self.method.example_config,
            device=self.device,
            encode=self.encode,
            rounded_input=self.rounded_input if rounds_input else None,
            rounding=self.rounding,
            weight_bytes=self.weight_bytes if is_declared else None,  # type: ignore[arg-type]
            excluded=self.excluded,
        )
        return _checks(subject, self.profile)

    def test_products_are_within_the_bound(self) -> None:
        """Against float64, of every projection."""
        self._check("product")

    def test_weights_that_are_read_back_are_those_given(self) -> None:
        """Where `dequantize` is offered."""
        self._check("weights")

    def test_heads_are_within_the_bound(self) -> None:
        """With weights of their own, and tied."""
        self._check("heads")

    def test_lookups_give_the_rows_of_their_ids(self) -> None:
        """Also beside a tied head."""
        self._check("look-ups")

    def test_nan_in_one_row_does_not_reach_the_others(self) -> None:
        """In one batch."""
        self._check("rows apart")

    def test_layers_keep_their_weights_apart(self) -> None:
        """Of one method."""
        self._check("layers apart")

    def test_bits_are_the_same_alone_and_in_a_batch(self) -> None:
        """Where `batch_invariant` is declared."""
        self._check("batch invariance")

    def test_layer_holds_what_is_declared(self) -> None:
        """Or no more than its plain weight."""
        self._check("memory")

    def test_excluded_layers_are_left_alone(self) -> None:
        """And others are not."""
        self._check("left alone")

    def test_norm_and_product_in_one_pass_equal_the_steps(self) -> None:
        """Where `apply_after_norm` is offered."""
        self._check("fused norm")

    def test_gate_and_product_in_one_pass_equal_the_steps(self) -> None:
        """Where `apply_after_silu_mul` is offered."""
        self._check("fused gate")
