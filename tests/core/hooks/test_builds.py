"""What is not built is passed over by `auto`, and built where it was asked for by name."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_builder import FakeBuild
from fake_classes import SPEC, FakeBackend, add_class
from fake_distributions import Installed, attention, raising, returning

from quire.errors import BuildError, ConfigError, PluginError
from quire.hooks import builds
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.selection import require_attention, select_attention
from quire.interfaces.plugin import AttentionPlugin, Selection


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> FakeBuild:
    """Return a plugin's build that was not done."""
    return FakeBuild(monkeypatch, "fast")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return where a class is that serves everything."""
    return add_class(monkeypatch, FakeBackend)


def registry_of(installed: Installed, *backends: AttentionPlugin) -> Registry:
    """Return a registry with the backends of one plugin."""
    installed.plugin("mine", "stranger", quire_attention_backends=returning(list(backends)))
    return load_plugins()


def test_auto_passes_over_what_is_not_built_and_says_so(
    installed: Installed, fast: FakeBuild, load: str
) -> None:
    registry = registry_of(
        installed,
        fast.descriptor("a_module_that_is_not_there:C", priority={"cpu": 9}),
        attention("slow", load, priority={"cpu": 1}),
    )

    _, _, selection = select_attention(registry, "auto", SPEC)

    assert selection.used == "slow"
    assert selection.passed_over == [("fast", "not built; run `quire build fast`.")]
    assert selection.unbuilt == ["fast"]
    assert fast.calls == 0


def test_auto_picks_what_was_built_meanwhile(
    installed: Installed, fast: FakeBuild, load: str
) -> None:
    registry = registry_of(
        installed,
        fast.descriptor(load, priority={"cpu": 9}),
        attention("slow", load, priority={"cpu": 1}),
    )

    fast.built = True

    _, _, selection = select_attention(registry, "auto", SPEC)
    assert (selection.used, selection.unbuilt) == ("fast", [])


def test_auto_does_not_count_what_comes_after_as_unbuilt(
    installed: Installed, fast: FakeBuild, load: str
) -> None:
    registry = registry_of(
        installed,
        fast.descriptor(load, priority={"cpu": 1}),
        attention("faster", load, priority={"cpu": 9}),
    )

    assert select_attention(registry, "auto", SPEC)[2].unbuilt == []


def test_explicit_attention_that_is_not_built_is_chosen_and_built_before_use(
    installed: Installed, fast: FakeBuild, load: str, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = registry_of(installed, fast.descriptor(load))

    plugin, _, choice = select_attention(registry, "fast", SPEC)
    assert choice.why == "asked for by name; it is not built yet, and the start builds it"
    assert fast.calls == 0, "choosing compiles nothing: `quire explain` chooses too"
    builds.build_before_use(registry, "attention", plugin.name)
    builds.build_before_use(registry, "attention", plugin.name)

    assert fast.calls == 1
    assert capsys.readouterr().err.splitlines() == [
        "quire: fast: not built yet; building it now, once",
        "quire: fast: half of it",
        "quire: fast: it is there",
    ]


def test_explicit_attention_whose_build_fails_ends_with_the_compilers_error(
    installed: Installed, fast: FakeBuild, load: str
) -> None:
    registry = registry_of(installed, fast.descriptor(load))
    fast.error = BuildError("g++ failed: a.cpp:1:1: error: no")

    with pytest.raises(BuildError) as caught:
        builds.build_before_use(registry, "attention", "fast")

    assert str(caught.value) == (
        "attention 'fast' cannot be built: g++ failed: a.cpp:1:1: error: no"
    )


def test_explicit_attention_that_cannot_serve_is_refused_before_it_is_built(
    installed: Installed, fast: FakeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    windowless = add_class(monkeypatch, FakeBackend, "it has no windows")
    registry = registry_of(installed, fast.descriptor(windowless))

    with pytest.raises(ConfigError, match="it has no windows"):
        select_attention(registry, "fast", SPEC)

    assert fast.calls == 0


def test_attention_to_be_checked_is_built_first(
    installed: Installed, fast: FakeBuild, load: str
) -> None:
    require_attention(registry_of(installed, fast.descriptor(load)), "fast")

    assert (fast.calls, fast.built) == (1, True)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"error": OSError("no room")}, "fails in 'fake_build_fast:build': OSError: no room."),
        ({"result": None}, "returns None from 'fake_build_fast:build' where one line is wanted."),
        ({"finishes": False}, "says that 'fast' is built, and is_built() says that it is not."),
    ],
    ids=["raises", "returns nothing", "does nothing"],
)
def test_build_that_breaks_its_contract_is_the_plugins_error(
    installed: Installed, fast: FakeBuild, change: dict[str, Any], fact: str
) -> None:
    registry = registry_of(installed, fast.descriptor())
    vars(fast).update(change)

    with pytest.raises(PluginError) as caught:
        builds.build(registry.entry("attention", "fast"), print)

    assert str(caught.value).startswith(f"plugin 'mine' of stranger 1.0 {fact}")


@pytest.mark.parametrize(
    ("is_built", "fact"),
    [
        (raising(RuntimeError("boom")), "fails in is_built() of 'mine': RuntimeError: boom."),
        (returning("yes"), "returns 'yes' from is_built() of 'mine' where a bool is wanted."),
    ],
)
def test_plugin_that_cannot_tell_whether_it_is_built_is_named(
    installed: Installed, load: str, is_built: Any, fact: str
) -> None:
    backend = attention("mine", load, priority={"cpu": 1}, build="a:b", is_built=is_built)
    registry = registry_of(installed, backend)

    with pytest.raises(PluginError) as caught:
        select_attention(registry, "auto", SPEC)

    assert str(caught.value).startswith(f"plugin 'mine' of stranger 1.0 {fact}")


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ({"build": "module"}, "build='module' does not name a function"),
        ({"is_built": returning(True)}, "sets is_built or builds_in_background without build"),
        ({"builds_in_background": True}, "sets is_built or builds_in_background without build"),
        ({"build": "a:b", "is_built": True}, "is_built=True cannot be called"),
    ],
)
def test_descriptor_with_a_build_that_makes_no_sense_is_refused(
    values: dict[str, Any], fact: str
) -> None:
    with pytest.raises(PluginError) as caught:
        attention("mine", **values)

    assert fact in str(caught.value)


def test_build_function_that_cannot_be_imported_is_the_plugins_error() -> None:
    with pytest.raises(PluginError, match="'mine': cannot load 'no_module:build': ModuleNotFound"):
        attention("mine", build="no_module:build").load_build()


def test_background_build_runs_the_command_of_what_allows_it_alone(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow, quick = FakeBuild(monkeypatch, "slow"), FakeBuild(monkeypatch, "quick")
    registry = registry_of(
        installed, slow.descriptor(), quick.descriptor(builds_in_background=True)
    )
    told = tmp_path / "told"
    popen = subprocess.Popen

    def play(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[1:] == ["-m", "quire", "build", "quick"]
        program = f"ps -o ni= -p $$ > {told}.part; mv {told}.part {told}"
        return popen(["sh", "-c", f"sleep 0.3; {program}"], **options)

    monkeypatch.setattr(builds.subprocess, "Popen", play)

    begin = time.perf_counter()
    assert builds.build_in_background(registry, "attention", ["slow", "quick"]) == ["quick"]
    assert time.perf_counter() - begin < 0.25, "a start waits for no compiler"

    deadline = time.monotonic() + 30
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert told.read_text().strip() == "19"


def test_what_auto_would_rather_have_used_is_told(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = FakeBuild(monkeypatch, "slow")
    registry = registry_of(installed, slow.descriptor(), attention("plain"))
    choice = Selection(
        kind="attention",
        requested="auto",
        used="other",
        why="priority 1 on cpu, the highest that can serve",
        passed_over=[
            ("slow", "not built; run `quire build slow`."),
            ("plain", "it has no sinks."),
        ],
        unbuilt=["slow"],
    )

    builds.tell_what_is_missing(registry, choice, ["slow"])
    late = [("slow", "it comes after, with priority 3.")]
    builds.tell_what_is_missing(registry, attrs.evolve(choice, passed_over=late), [])

    assert capsys.readouterr().err == (
        "quire: attention 'other' is used, not 'slow': not built; run `quire build slow`. "
        "It is being built for the next start.\n"
    )
