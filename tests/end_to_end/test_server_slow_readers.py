"""Clients that ask and then read nothing: what was written for them does not stay."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving

LONG: dict[str, Any] = {"model": "demo", "prompt": "Hi", "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    with serving("--reader-timeout-s", "1", "--max-num-seqs", "64") as running:
        yield running


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def wait_for_files(server: Server, count: int) -> None:
    end_s = time.monotonic() + 10
    while open_files(server) > count:
        assert time.monotonic() < end_s
        time.sleep(0.1)


def ask_without_reading(client: socket.socket, server: Server, body: dict[str, Any]) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(data) + data
    )


def test_whole_answer_that_nobody_takes_does_not_stay(impatient: Server) -> None:
    impatient.figure("quire:requests_total")
    before = open_files(impatient)
    with socket.socket() as client:
        body = {**LONG, "max_tokens": 100, "n": 64, "logprobs": 20}
        ask_without_reading(client, impatient, body)
        impatient.wait_for_log(r"POST /v1/completions 200", timeout_s=120)

        wait_for_files(impatient, before)


def test_reader_that_stops_is_given_up(impatient: Server) -> None:
    with socket.socket() as client:
        body = {**LONG, "max_tokens": 2000, "n": 64, "stream": True}
        ask_without_reading(client, impatient, body)
        end_s = time.monotonic() + 120
        while 'outcome="cancelled"' not in impatient.get("/metrics"):
            assert time.monotonic() < end_s
            time.sleep(0.1)
    impatient.wait_until_idle()


@pytest.mark.slow
def test_websocket_that_reads_nothing_is_given_up(impatient: Server) -> None:
    impatient.figure("quire:requests_total")
    before = open_files(impatient)
    body = {**LONG, "max_tokens": 2000, "n": 64, "messages": [{"role": "user", "content": "Hi"}]}
    del body["prompt"]
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", impatient.port))
        raw.sendall(
            b"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\n"
            b"upgrade: websocket\r\nsec-websocket-version: 13\r\n"
            b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        raw.recv(1)
        data = json.dumps(body).encode()
        raw.sendall(struct.pack("!BBHI", 0x81, 0xFE, len(data), 0) + data)  # masked with zeros
        impatient.wait_for_log(r"WS /v1/chat/completions 499 .*first_token_ms", timeout_s=120)
        impatient.wait_until_idle()
        wait_for_files(impatient, before)
    assert "Traceback" not in impatient.read_log()
