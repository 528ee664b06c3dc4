"""Bytes that no client library sends: heads and bodies too large, too slow, or no HTTP at all."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from serving import Server, serving

LIMITS = (
    *("--max-body-bytes", "4096", "--max-header-bytes", "2048", "--header-timeout-s", "0.5"),
    *("--body-timeout-s", "0.5", "--idle-timeout-s", "2"),
)
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(*LIMITS) as running:
        yield running
        running.wait_until_idle()


def exchange(server: Server, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send some bytes and return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        for part in parts:
            try:
                client.sendall(part)
            except OSError:  # refused before all of it was sent
                break
            time.sleep(pause_s)
        found = b""
        try:
            while data := client.recv(65536):
                found += data
        except ConnectionResetError:
            pass
    return found


def check(answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 3000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-never-ends: " + b"a" * 100_000,
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 120 + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["large", "endless", "many", "long path"],
)
def test_head_that_is_too_large_is_refused(server: Server, head: bytes) -> None:
    check(exchange(server, head), 431, "headers_too_large")


def test_body_that_says_it_is_too_large_is_refused_before_it_comes(server: Server) -> None:
    check(exchange(server, POST + b"content-length: 999999999\r\n\r\n"), 413, "body_too_large")


def test_body_that_becomes_too_large_is_refused(server: Server) -> None:
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    answer = exchange(server, POST + b"transfer-encoding: chunked\r\n\r\n", chunk, chunk)

    check(answer, 413, "body_too_large")


def test_head_that_comes_too_slowly_is_given_up(server: Server) -> None:
    begin_s = time.monotonic()

    answer = exchange(server, b"POST /v1/comp", b"letions", pause_s=0.1)

    check(answer, 408, "timeout")
    assert time.monotonic() - begin_s < 2


def test_body_that_comes_too_slowly_is_given_up(server: Server) -> None:
    answer = exchange(server, POST + b"content-length: 100\r\n\r\n", b"{", pause_s=0.1)

    assert b"HTTP/1.1 408 " in answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n\r\n",
        b"GET /health\r\n\r\n",
        POST + b"content-length: -5\r\n\r\n",
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcde",
        POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["tls", "nonsense", "version", "no version", "negative", "two lengths", "both"],
)
def test_bytes_that_are_no_http_get_an_error_object(server: Server, data: bytes) -> None:
    check(exchange(server, data), 400, "malformed_request")


@pytest.mark.parametrize("rest", [b"5;" + b"a" * 9000, b"0\r\nx: " + b"a" * 9000])
@pytest.mark.parametrize("at_once", [True, False])
def test_endless_chunk_sizes_and_trailers_are_refused(
    server: Server, rest: bytes, at_once: bool
) -> None:
    parts = (POST + b"transfer-encoding: chunked\r\n\r\n", rest, rest)

    answer = exchange(server, *([b"".join(parts)] if at_once else parts), pause_s=0.02)

    check(answer, 431, "headers_too_large")


def test_body_that_trickles_is_given_up(server: Server) -> None:
    begin_s = time.monotonic()

    answer = exchange(server, POST + b"content-length: 100\r\n\r\n", *[b" "] * 9, pause_s=0.1)

    assert b"HTTP/1.1 408 " in answer
    assert time.monotonic() - begin_s < 2


def test_request_answered_before_its_end_must_end_soon(server: Server) -> None:
    head = POST.replace(b"/v1/completions", b"/nope") + b"content-length: 100\r\n\r\n"
    begin_s = time.monotonic()

    answer = exchange(server, head, *[b" "] * 20, pause_s=0.1)

    check(answer, 404, "not_found")
    assert time.monotonic() - begin_s < 2.5


def test_answer_to_a_large_body_reaches_a_client_that_sends_all_of_it(server: Server) -> None:
    body = b"x" * 20_000_000
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)

        answer = client.recv(65536)

    check(answer, 413, "body_too_large")


def test_bytes_that_are_no_http_do_not_overtake_an_answer(server: Server) -> None:
    body = b'{"model":"demo","prompt":"Hi","max_tokens":30,"ignore_eos":true}'
    request = POST + b"content-length: %d\r\n\r\n" % len(body) + body

    answer = exchange(server, request + b"nonsense\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("pause_s", [0.0, 0.1])
@pytest.mark.parametrize(
    "offer", [b"Upgrade, HTTP2-Settings\r\nupgrade: h2c", b"upgrade\r\nupgrade: websocket"]
)
def test_offer_of_another_protocol_does_not_lose_the_body(
    server: Server, offer: bytes, pause_s: float
) -> None:
    body = b'{"model":"demo","prompt":"Hi","max_tokens":2}'
    head = POST + b"connection: %b\r\n" % offer + b"content-length: %d\r\n\r\n" % len(body)
    more = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    parts = (head, body, more) if pause_s else (head + body + more,)

    answer = exchange(server, *parts, pause_s=pause_s)

    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b'"completion_tokens":2' in answer


def test_connection_that_says_nothing_is_closed(server: Server) -> None:
    begin_s = time.monotonic()

    assert exchange(server) == b""
    assert 1 < time.monotonic() - begin_s < 5


def test_requests_sent_at_once_are_answered_in_order(server: Server) -> None:
    get = b"GET /%b HTTP/1.1\r\nhost: x\r\n%b\r\n"
    answer = exchange(server, get % (b"version", b"") + get % (b"health", b"connection: close\r\n"))

    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.index(b'"version"') < answer.index(b'"ok"')


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_closes_its_sending_side_counts_as_gone(server: Server, stream: bool) -> None:
    asked = {"model": "demo", "prompt": "Hi", "max_tokens": 1500, "ignore_eos": True}
    body = json.dumps({**asked, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        while not server.figure("vllm:num_requests_running"):
            time.sleep(0.01)
        client.shutdown(socket.SHUT_WR)

        server.wait_until_idle(timeout_s=1.0)
        while client.recv(65536):
            pass


def test_body_cut_off_by_the_client_leaves_nothing(server: Server) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(POST + b"content-length: 1000\r\n\r\n" + b"{")

    server.wait_until_idle()
