"""Lines that cannot be forged, and a log that is never waited for."""

from __future__ import annotations

import json
import logging
import queue
import sys

import pytest

from quire.server.logs import LineHandler, WaitingLines


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("quire.x", logging.INFO, "f", 1, message, None, None)
    made.fields = fields
    return made


def test_a_line_cannot_be_forged(capfd: pytest.CaptureFixture[str]) -> None:
    LineHandler(as_json=False).emit(record("a\nb", path="/\x1b[31m\r\n"))

    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "\x1b" not in line
    assert r"a\nb" in line


def test_json_lines_hold_the_fields(capfd: pytest.CaptureFixture[str]) -> None:
    LineHandler(as_json=True).emit(record("done", request_id="r\n1", tokens=3))

    line = json.loads(capfd.readouterr().err)
    assert (line["message"], line["request_id"], line["tokens"]) == ("done", "r\n1", 3)


def test_half_characters_are_shown(capfd: pytest.CaptureFixture[str]) -> None:
    LineHandler(as_json=False).emit(record("\ud83d"))

    assert r"\ud83d" in capfd.readouterr().err


def test_full_queue_loses_lines_and_waits_for_nobody() -> None:
    lines = WaitingLines(queue.Queue(2))

    for number in range(5):
        lines.emit(record(str(number)))

    assert [lines.queue.get().getMessage() for _ in range(2)] == ["0", "1"]


def test_a_closed_stream_costs_a_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)

    LineHandler(as_json=False).emit(record("x"))
