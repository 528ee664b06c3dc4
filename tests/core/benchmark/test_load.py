"""What is missing is said in one line; what answers hold is taken down."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from quire.benchmark.chart import draw
from quire.benchmark.load import Result, Target, check_installed, run_closed
from quire.benchmark.workload import Ask, completion_body
from quire.errors import ConfigError


def test_client_that_is_not_installed_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)

    with pytest.raises(ConfigError, match=r"pip install 'quire\[bench\]'"):
        check_installed()


def test_diagrams_without_matplotlib_are_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ConfigError, match=r"pip install 'quire\[bench\]'"):
        draw([], tmp_path / "x.png")


def test_diagram_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        draw([], tmp_path / "nowhere" / "x.png")


def read(*events: str) -> Result:
    """Return what is made of an answer with these events."""
    body = "".join(f"data: {event}\n\n" for event in events)

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=body, content_type="text/event-stream")

    async def run() -> Result:
        application = web.Application()
        application.router.add_post("/", answer)
        async with TestServer(application) as server:
            url = str(server.make_url("")).rstrip("/")
            target = Target(base_url=url, path="/", write=completion_body("m", {}))
            ask = Ask(at_s=0.0, prompt=(1,), max_tokens=1)
            return (await run_closed(target, [ask], 1)).results[0]

    return asyncio.run(run())


def test_answer_without_text_is_an_answer() -> None:
    end = '{"choices": [{"text": "", "finish_reason": "stop"}]}'
    usage = '{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'

    result = read(end, usage, "[DONE]")

    assert result.error is None
    assert result.num_tokens == 1
    assert 0 < result.first_s <= result.whole_s


@pytest.mark.parametrize(
    "event", ["[]", '{"choices": [5]}', '{"choices": null}', '{"usage": {"a": 1}}', "{"]
)
def test_event_of_another_form_is_the_requests_error(event: str) -> None:
    assert read(event, "[DONE]").error


def test_stream_that_is_cut_off_is_an_error() -> None:
    assert read('{"choices": [{"text": "a"}]}').error == (
        "the stream ended without finish_reason and [DONE]"
    )
