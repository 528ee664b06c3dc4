"""What takes long says what it is; what does not says nothing."""

from __future__ import annotations

import time

import pytest

from quire.patience import telling


def test_body_that_takes_long_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with telling(after_s=0.02) as wait:
        wait.words = "the moon"
        time.sleep(0.2)

    told = "quire: still waiting for the moon after 0.02 s; Ctrl-C ends it\n"
    assert capsys.readouterr().err == told


def test_words_of_a_function_are_asked_for_when_it_is_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "the sun"

    with telling(lambda: words, after_s=0.02):
        words = "the moon"
        time.sleep(0.2)

    assert "waiting for the moon after" in capsys.readouterr().err


def test_body_that_ends_in_time_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with telling("the moon", after_s=0.05):
        pass

    time.sleep(0.1)
    assert capsys.readouterr().err == ""
