"""Who is let in, what they may learn of each other, and what is logged of them."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets.sync.client
from serving import QUIRE, Server, children, serving

LONG = "I would like a large latte with oat milk, " * 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# two more\nsecond\n\nthird\n")
    options = ("--api-key", "first", "--api-key-file", str(file), "--log-json")
    with serving(*options, "--allowed-origins", "https://app.example") as running:
        yield running


def ask(server: Server, key: str | None, **fields: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": "demo", "prompt": LONG, "max_tokens": 1, **fields}
    return httpx.post(server.url + "/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/docs"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic first", "first"])
def test_no_path_answers_without_a_right_key(server: Server, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}

    answer = httpx.get(server.url + path, headers=headers)

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_health_needs_no_key(server: Server) -> None:
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("key", ["first", "second", "third"])
def test_every_key_lets_in(server: Server, key: str) -> None:
    assert ask(server, key).status_code == 200


def test_prompts_of_another_key_are_not_found_in_the_cache(server: Server) -> None:
    def cached(key: str, **fields: Any) -> int:
        usage = ask(server, key, prompt="Good morning! " + LONG, **fields).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("first") == 0
    assert cached("first") > 0
    assert cached("second") == 0
    assert cached("first", cache_salt="own") == 0


def test_websocket_without_a_key_is_refused(server: Server) -> None:
    url = server.url.replace("http", "ws") + "/v1/chat/completions"

    with pytest.raises(websockets.exceptions.InvalidStatus, match="40[13]"):
        websockets.sync.client.connect(url)


@pytest.mark.parametrize("origin", ["https://other.example", "null", "http://127.0.0.1:1"])
def test_websocket_of_another_sites_page_is_refused(server: Server, origin: str) -> None:
    url = server.url.replace("http", "ws") + "/v1/chat/completions"
    headers = {"authorization": "Bearer first", "origin": origin}

    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        websockets.sync.client.connect(url, additional_headers=headers)

    assert caught.value.response.status_code == 403
    assert json.loads(caught.value.response.body)["error"]["code"] == "origin_not_allowed"


@pytest.mark.parametrize("origin", ["https://app.example", "own"])
def test_websocket_of_an_allowed_page_is_let_in(server: Server, origin: str) -> None:
    url = server.url.replace("http", "ws") + "/v1/chat/completions"
    headers = {"authorization": "Bearer first"}
    headers["origin"] = server.url if origin == "own" else origin

    with websockets.sync.client.connect(url, additional_headers=headers) as socket:
        socket.send("{")
        assert "error" in json.loads(socket.recv(10))


def test_refusal_says_how_long_it_is(server: Server) -> None:
    answer = httpx.get(server.url + "/v1/models")

    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_origins_are_let_in_by_name_only(server: Server) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return httpx.options(server.url + "/v1/completions", headers=headers)

    assert preflight("https://app.example").headers["access-control-allow-origin"]
    refused = preflight("https://other.example")
    assert "access-control-allow-origin" not in refused.headers
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "origin_not_allowed")


def test_log_is_json_with_ids_and_without_prompts_and_keys(server: Server) -> None:
    headers = {"authorization": "Bearer first", "x-request-id": "mine-1"}
    body = {"model": "demo", "prompt": "a very private prompt", "max_tokens": 1}
    httpx.post(server.url + "/v1/completions", json=body, headers=headers)

    found = server.wait_for_log(r'(?m)^.*"mine-1".*$')[0]

    line = json.loads(found)
    assert (line["prompt_tokens"] > 0, line["level"]) == (True, "info")
    log = server.read_log()
    for text in log.splitlines():
        json.loads(text)
    assert "private" not in log
    assert "first" not in [json.loads(text).get("key") for text in log.splitlines()]


def test_prompts_are_logged_when_asked_for() -> None:
    with serving("--log-prompts") as server:
        ask(server, None, prompt="a very private prompt")

        server.wait_for_log("private")


@pytest.mark.parametrize(
    "options",
    [
        ("--api-key", ""),
        ("--api-key", "two words"),
        ("--api-key", "a-secret", "--api-key", ""),
        ("--api-key-file", "/nowhere/keys"),
        ("--ssl-keyfile", "key.pem"),
        ("--ssl-certfile", "/nowhere/cert.pem", "--ssl-keyfile", "/nowhere/key.pem"),
        ("--port", "70000"),
        ("--host", "256.1.1.1"),
        ("--allowed-origins", "not an origin"),
        ("--no-such-option",),
        ("--max-queued-requests", "0"),
        ("--reader-timeout-s", "nan"),
    ],
    ids=" ".join,
)
def test_bad_setting_is_one_line_before_anything_starts(options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [QUIRE, "serve", "demo", *options], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "a-secret" not in done.stderr
    assert options[0].removeprefix("--") in done.stderr.replace("_", "-")


def test_nothing_listens_but_the_port(server: Server) -> None:
    pids = [server.process.pid, *(pid for pid, _ in children(server.process.pid))]
    sockets = {
        target
        for pid in pids
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if (target := os.readlink(link)).startswith("socket:")
    }
    listening = set()
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{server.process.pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in sockets and (fields[3] == "0A" or name[0] == "u"):
                listening.add(fields[1])

    assert listening == {f"0100007F:{server.port:04X}"}


def test_port_in_use_is_one_line(server: Server) -> None:
    done = subprocess.run(
        [QUIRE, "serve", "demo", "--port", str(server.port)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(server.port) in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    with serving("--ssl-keyfile", str(key), "--ssl-certfile", str(cert)) as server:
        context = ssl.create_default_context(cafile=cert)
        url = f"https://127.0.0.1:{server.port}"
        body = {"model": "demo", "prompt": "Hi", "max_tokens": 2}

        assert httpx.get(url + "/health", verify=context).status_code == 200
        assert httpx.post(url + "/v1/completions", json=body, verify=context).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{server.port}/health")
