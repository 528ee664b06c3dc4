"""Parts of a start add up by name and are told in the order in which they began."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tiny_llama

from quire.phases import Phases


def test_parts_are_in_the_order_of_their_beginnings_and_add_up() -> None:
    phases = Phases()
    for name in ("checks", "weights", "checks"):
        with phases.timed(name):
            time.sleep(0.01)

    assert list(phases.seconds) == ["checks", "weights"]
    assert phases.seconds["checks"] >= 0.02


def test_a_part_that_fails_is_timed_too() -> None:
    phases = Phases()

    with pytest.raises(KeyError), phases.timed("checks"):
        raise KeyError

    assert "checks" in phases.seconds


def test_text_leaves_out_what_took_no_time() -> None:
    assert str(Phases({"checks": 0.04, "weights": 1.26, "all": 2.0})) == "weights 1.3 s, all 2.0 s"


def test_an_engine_says_what_its_start_was_spent_on(tmp_path: Path) -> None:
    engine = tiny_llama.make_engine(tiny_llama.write_folder(tmp_path))

    assert list(engine.prepared.phases.seconds) == [
        "checks",
        "tokenizer",
        "device",
        "plugins",
        "build",
        "choices",
        "weights",
        "kv cache",
        "self-check",
    ]
