"""The kit's doors to samplers: a function, a class to subclass in pytest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

from attrs import evolve
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.interfaces.sampling import Sampler
from quire.testing import sampler_checks as checks
from quire.testing import search
from quire.testing.kit_report import CheckResult, Profile, Report, profile_of
from quire.testing.sampler_cases import BAD, Row, SamplerCase
from quire.testing.sampler_checks import SamplerSubject

__all__ = ["SamplerSubject", "SamplerTests", "check_sampler", "iter_sampler"]

VOCAB_SIZES = [12, 5, 1, 2, 100, 1000, 4099, 32000, 128256]
SMALL = 4099
SHAPES = ["normal", "ties", "flat", "peaked", "sparse"]
DTYPES = ["float32", "bfloat16", "float16"]
# More tokens than 16 bits count, the likeliest of the first row one of them; filters that keep more
# than a tile has.
_LARGE = SamplerCase(
    rows=(
        Row(temperature=0.01),
        *(Row(top_k=2000, seed=seed) for seed in (2, 5)),
        Row(top_p=0.97, seed=4),
    ),
    vocab_size=70000,
    seed=2,
)
LAYOUTS = ["contiguous", "rows apart", "columns apart"]


@st.composite
def rows(draw: st.DrawFn, *, bad: bool = False, greedy: bool | None = None) -> Row:
    """Draw how a row is drawn; `greedy` None: some rows are."""
    drawn = [1.0, 0.3, 2.5, 0.01, 50.0]
    temperature = {True: [0.0], False: drawn, None: [0.0, *drawn]}[greedy]
    return Row(
        temperature=draw(st.sampled_from(temperature)),
        top_k=draw(st.sampled_from([None, None, None, 1, 2, 3, 5, 40])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5, 0.1, 1e-6, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.05, 0.3, 1.0])),
        seed=draw(st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 9))),
        child=draw(st.integers(0, 127)),
        position=draw(st.one_of(st.integers(0, 40), st.integers(0, 2**20))),
        bad=draw(st.sampled_from(list(BAD))) if bad else "",
        suppressed=draw(st.sampled_from([0, 0, 0, 1, 3])),
    )


@st.composite
def filtered_cases(draw: st.DrawFn, vocab_sizes: Sequence[int]) -> SamplerCase:
    """Draw one row that asks for several filters, each of which drops something, or for none."""
    row = Row(
        temperature=draw(st.sampled_from([1.0, 0.5, 2.5])),
        top_k=draw(st.sampled_from([3, 2, 5, 8, None])),
        top_p=draw(st.sampled_from([0.7, 0.5, 0.9, 0.3, 1.0, 0.99])),
        min_p=draw(st.sampled_from([0.0, 0.1, 0.3, 0.02])),
        seed=draw(st.integers(0, 2**40)),
        child=draw(st.sampled_from([0, 1, 5])),
        position=draw(st.sampled_from([0, 7, 2**16 - 9, 2**20])),
    )
    # All tokens are near each other: it shows how exactly they are compared.
    plain = evolve(row, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0)
    shapes = ["normal", "normal", "normal", "ties", "sparse"]
    row, shapes = draw(st.sampled_from([(row, shapes)] * 3 + [(plain, ["normal"])]))
    return SamplerCase(
        rows=(row,),
        vocab_size=draw(st.sampled_from(vocab_sizes)),
        shape=draw(st.sampled_from(shapes)),
        dtype=draw(st.sampled_from(DTYPES)),
        more_flags=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def sampler_cases(
    draw: st.DrawFn,
    row: st.SearchStrategy[Row],
    vocab_sizes: Sequence[int],
    *,
    least: int = 0,
) -> SamplerCase:
    """Draw a batch."""
    vocab_size = draw(st.sampled_from(vocab_sizes))
    case = SamplerCase(
        rows=tuple(draw(st.lists(row, min_size=least, max_size=5))),
        vocab_size=vocab_size,
        shape=draw(st.sampled_from(SHAPES)),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        more_flags=draw(st.sampled_from([False, False, True])),
        seed=draw(st.integers(0, 999)),
    )
    # NaN beside +inf needs two tokens.
    return case if vocab_size > 1 else evolve(case, shape="normal")


def _why_no_graph(subject: SamplerSubject) -> str | None:
    if not subject.sampler.capturable:
        return "capturable is not declared"
    return None if subject.device == "cuda" else "a graph needs a CUDA device"


def _checks(
    subject: SamplerSubject, profile: Profile, vocab_sizes: Sequence[int]
) -> list[search.Check]:
    reason = subject.sampler.why_unsupported(subject.device)
    if reason is not None:
        name = subject.sampler.__name__
        raise ConfigError(f"{name} does not run on {subject.device}: {reason}.")
    sizes = vocab_sizes or [n for n in VOCAB_SIZES if n <= SMALL or not profile.small]
    mixed = sampler_cases(rows(), sizes)
    greedy = sampler_cases(rows(greedy=True), sizes)
    bad = sampler_cases(rows(bad=True), sizes, least=1)
    drawn = sampler_cases(rows(greedy=False), [n for n in sizes if n <= 100] or sizes, least=1)
    filtered = filtered_cases([n for n in sizes if 10 < n < SMALL] or sizes)
    guess = partial(checks.guess_draws, subject)
    filters = partial(checks.check_filters, subject)
    judge = partial(checks.check_draws, subject)
    alone = partial(checks.check_alone, subject)
    many = partial(checks.check_distribution, subject)
    graph = partial(checks.check_graph, subject)
    skipped = _why_no_graph(subject)
    return [
        search.Check(name="greedy", judge=judge, cases=greedy, share=0.1),
        search.Check(name="draws", judge=judge, cases=mixed, share=0.25, guess=guess),
        search.Check(name="filters", judge=filters, cases=filtered, share=0.3, guess=guess),
        search.Check(name="bad rows", judge=judge, cases=bad, share=0.1, guess=guess),
        search.Check(name="alone", judge=alone, cases=mixed, share=0.1),
        search.Check(name="distribution", judge=many, cases=drawn, share=0.1),
        search.Check(name="many tokens", judge=judge, cases=st.just(_LARGE), share=0.05, most=1),
        search.Check(name="graph replay", judge=graph, cases=bad, share=0.05, skipped=skipped),
    ]


def iter_sampler(
    subject: SamplerSubject,
    *,
    profile: str | Profile = "quick",
    vocab_sizes: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[CheckResult]:
    """Yield the result of each check of a sampler as it ends.

    Raises: ConfigError for an unknown profile, or a sampler that does not run on the device.
    """
    chosen = profile_of(profile)
    yield from search.run_all(_checks(subject, chosen, vocab_sizes), chosen, seed)


def check_sampler(
    sampler: type[Sampler],
    *,
    profile: str | Profile = "quick",
    device: str = "cpu",
    vocab_sizes: Sequence[int] = (),
    seed: int = 0,
) -> Report:
    """Check a sampler and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile, or a sampler that does not run on the device.
    """
    subject = SamplerSubject(sampler=sampler, device=device)
    name, chosen = sampler.__name__, profile_of(profile).name
    report = Report(kind="sampler", name=name, profile=chosen, device=device, seed=seed, checks=[])
    results = iter_sampler(subject, profile=profile, vocab_sizes=vocab_sizes, seed=seed)
    return search.report_of(results, report)


class SamplerTests(search.KitTests):
    """Subclass this in a test file, name the sampler, and pytest runs every check.

    `vocab_sizes` restricts the vocabularies; a row is drawn `num_draws` times to count its tokens.
    """

    sampler: ClassVar[type[Sampler]]
    vocab_sizes: ClassVar[Sequence[int]] = ()
    num_draws: ClassVar[int] = 2000

    def _checks(self) -> list[search.Check]:
        subject = SamplerSubject(sampler=self.sampler, device=self.device, num_draws=self.num_draws)
        return _checks(subject, self.profile, self.vocab_sizes)

    def test_greedy_rows_take_the_largest_logit_of_the_lowest_id(self) -> None:
        """Among all rows that are greedy."""
        self._check("greedy")

    def test_draws_are_the_function_that_the_contract_defines(self) -> None:
        """Of logits, parameters, seed, child index and position."""
        self._check("draws")

    def test_filters_leave_what_the_contract_says(self) -> None:
        """At many positions of one row."""
        self._check("filters")

    def test_rows_that_are_not_finite_get_their_status_alone(self) -> None:
        """And leave the others as they are."""
        self._check("bad rows")

    def test_rows_are_the_same_alone_and_in_a_batch(self) -> None:
        """And at another place of it."""
        self._check("alone")

    def test_draws_follow_the_distribution(self) -> None:
        """Over many seeds, children and positions."""
        self._check("distribution")

    def test_draws_among_more_tokens_than_16_bits_count(self) -> None:
        """With filters that keep many."""
        self._check("many tokens")

    def test_graph_serves_other_rows_than_it_was_captured_with(self) -> None:
        """Where `capturable` is declared."""
        self._check("graph replay")
