"""The conformance kit's two doors to attention: a function, a class to subclass in pytest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from quire.errors import ConfigError
from quire.interfaces.attention import AttentionBackend, AttentionSpec
from quire.testing import search
from quire.testing.attention_cases import LIMITS
from quire.testing.attention_checks import CHECKS, check_long, check_output, checks_of_long
from quire.testing.attention_run import Subject
from quire.testing.attention_strategies import (
    Choices,
    cases,
    choices_of,
    crowded_cases,
    first_cases,
    first_long_cases,
    given_specs,
    long_cases,
    prompt_cases,
    why_not_long,
    without_shapes,
)
from quire.testing.attention_strategies import specs as served_specs
from quire.testing.diagnosis import guess_output
from quire.testing.kit_report import PROFILES, CheckResult, Profile, Report, profile_of
from quire.testing.large_cache import MOST_CASES, check_large_cache, why_no_large_cache
from quire.testing.search import check_device

__all__ = [
    "PROFILES",
    "AttentionBackendTests",
    "CheckResult",
    "Profile",
    "Report",
    "check_attention",
    "check_device",
    "iter_attention",
]


def _checks(
    choices: Choices, profile: Profile, only: Sequence[AttentionSpec] = ()
) -> list[search.Check]:
    """Return the checks of a backend."""
    subject = Subject(backend=choices.backend, options=choices.options)
    first = () if only else tuple(first_cases(choices, profile))
    drawn = given_specs(only) if only else served_specs(choices, profile.small)
    found = [
        search.Check(
            name=check.name,
            judge=partial(check.judge, subject),
            cases=cases(drawn, profile.longest, single=check.single),
            share=check.share,
            first=first if check.name == "output" else (),
            skipped=_why_alone(choices, check.name) or check.why_skipped(choices),
            guess=None if check.guess is None else partial(check.guess, subject),
        )
        for check in CHECKS
    ]
    return [*found, *_large_checks(subject, choices, profile)]


def _why_alone(choices: Choices, name: str) -> str | None:
    """Return why a check is not for a backend that serves encoders and nothing else."""
    is_for_it = choices.plain.causal or name == "encoder"
    return None if is_for_it else "it serves encoders alone"


def _large_checks(subject: Subject, choices: Choices, profile: Profile) -> list[search.Check]:
    """Return the checks whose cases take long: of these few are drawn, or none."""
    most = profile.large_cases
    has_none = None if most else f"the profile {profile.name} has no cases of that size"
    has_none = has_none or _why_alone(choices, "")
    sequences, keys, prompts = 300, LIMITS.max_model_len, (300, 1500)
    query_lens: tuple[int, ...] = (1, 1, 2, 17, 40)
    if profile.small:
        # So few programs and steps that Triton's interpreter ends too.
        choices, sequences, keys, query_lens = without_shapes(choices), 40, 1200, (1,)
        prompts = (64, 140)
    judge, guess = partial(check_output, subject), partial(guess_output, subject)
    not_long = has_none or why_not_long(choices)
    return [
        search.Check(
            name="many sequences",
            judge=judge,
            cases=crowded_cases(choices, sequences),
            share=0.07,
            most=most,
            skipped=has_none,
        ),
        search.Check(
            name="long prompts",
            judge=judge,
            cases=prompt_cases(choices, *prompts),
            share=0.05,
            most=most,
            guess=guess,
            skipped=has_none,
        ),
        search.Check(
            name="thousands of keys",
            judge=partial(check_long, subject, [] if not_long else checks_of_long(choices)),
            cases=long_cases(choices, keys, query_lens),
            share=0.07,
            most=most,
            guess=guess,
            first=[] if not_long else first_long_cases(choices, keys),
            skipped=not_long,
        ),
        search.Check(
            name="large cache",
            judge=partial(check_large_cache, subject),
            cases=cases(served_specs(choices, small=True), longest=9 if profile.small else 40),
            share=0.03,
            most=min(most, MOST_CASES),
            skipped=has_none or why_no_large_cache(choices, subject, is_small=profile.small),
        ),
    ]


def iter_attention(
    backend: type[AttentionBackend],
    *,
    profile: str | Profile = "quick",
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    specs: Sequence[AttentionSpec] = (),
    seed: int = 0,
) -> Iterator[CheckResult]:
    """Yield the result of each check of a backend as it ends; `specs` restricts the cases.

    Raises: ConfigError for an unknown profile, or a backend that serves nothing on the device.
    """
    chosen = profile_of(profile)
    choices = _choices(Subject(backend=backend, options=options or {}), device, specs)
    yield from search.run_all(_checks(choices, chosen, specs), chosen, seed)


def _choices(subject: Subject, device: str, only: Sequence[AttentionSpec] = ()) -> Choices:
    """Return what is drawn from: the given specifications, or what the backend says."""
    if only:
        backend, options = subject.backend, subject.options
        return Choices(backend=backend, options=options, plain=only[0], changes={})
    choices = choices_of(subject, device)
    if isinstance(choices, str):
        raise ConfigError(
            f"{subject.backend.__name__} serves nothing that the kit asks for on {device}: "
            f"{choices}. Give `specs` that it serves, or another device."
        )
    return choices


def check_attention(
    backend: type[AttentionBackend],
    *,
    profile: str | Profile = "quick",
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    specs: Sequence[AttentionSpec] = (),
    seed: int = 0,
) -> Report:
    """Check a backend and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile, or a backend that serves nothing on the device.
    """
    results = iter_attention(
        backend, profile=profile, device=device, options=options, specs=specs, seed=seed
    )
    report = Report(
        kind="attention",
        name=backend.__name__,
        profile=profile_of(profile).name,
        device=device,
        seed=seed,
        checks=[],
    )
    return search.report_of(results, report)


class AttentionBackendTests(search.KitTests):
    """Subclass this in a test file, name the backend, and pytest runs every check.

    `specs` restricts the cases to some specifications; without it the backend's own
    `why_unsupported` says what is drawn.
    """

    backend: ClassVar[type[AttentionBackend]]
    options: ClassVar[Mapping[str, Any]] = {}
    specs: ClassVar[Sequence[AttentionSpec]] = ()

    def _checks(self) -> list[search.Check]:
        subject = Subject(backend=self.backend, options=self.options)
        choices = _choices(subject, self.device, self.specs)
        return _checks(choices, self.profile, self.specs)

    def test_output_is_within_the_bound_and_hidden_memory_is_not_read(self) -> None:
        """Against float64, on poisoned memory."""
        self._check("output")

    def test_blocks_of_others_are_not_changed(self) -> None:
        """But for block 0."""
        self._check("blocks")

    def test_each_slot_has_memory_of_its_own(self) -> None:
        """In its own block."""
        self._check("slots")

    def test_plans_and_layers_are_apart(self) -> None:
        """Two steps in flight, two layers each."""
        self._check("plans apart")

    def test_nan_in_one_sequence_does_not_reach_the_others(self) -> None:
        """In one batch."""
        self._check("rows apart")

    def test_lse_is_the_log_sum_exp_of_the_scores(self) -> None:
        """Where the backend offers it."""
        self._check("log-sum-exp")

    def test_bits_are_the_same_alone_and_in_a_batch(self) -> None:
        """Where `batch_invariant` is declared."""
        self._check("batch invariance")

    def test_graph_serves_other_lengths_than_it_was_captured_with(self) -> None:
        """Where `graph_support` says so."""
        self._check("graph replay")

    def test_thousands_of_keys_are_within_the_bound(self) -> None:
        """Keys and values in 16 bits."""
        self._check("thousands of keys")

    def test_many_sequences_are_within_the_bound(self) -> None:
        """More than there are lanes in a warp."""
        self._check("many sequences")

    def test_long_prompts_are_within_the_bound(self) -> None:
        """Chunks of more rows than a tile has."""
        self._check("long prompts")

    def test_offsets_are_right_in_a_cache_of_more_than_2_to_the_31_numbers(self) -> None:
        """On a GPU in the full profile."""
        self._check("large cache")

    def test_graph_of_any_step_serves_other_batches(self) -> None:
        """Where `graph_support` is ANY."""
        self._check("graph of any step")

    def test_fused_write_equals_its_steps(self) -> None:
        """Where `rotate_and_write` is offered."""
        self._check("rotate_and_write")

    def test_encoder_sees_all_keys_without_a_cache(self) -> None:
        """Where bidirectional attention is served."""
        self._check("encoder")
