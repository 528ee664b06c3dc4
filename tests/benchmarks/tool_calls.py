"""How often the demo calls the recorded function with the recorded arguments, through a server.

    python tests/benchmarks/tool_calls.py [--dialogues FILE.jsonl] [--limit N] [--url URL]
        [--strict] [--tool-choice auto|required] [--temperature T]

Every assistant turn of the dialogues is asked for with its true context, all tools, greedily and
by OpenAI's client, whole and streamed in turn; without `--url` it starts `quire serve demo`.
With `--strict` every function is strict; calls are judged by jsonschema. With `--tool-choice
required` only the turns that call a function are asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai

ROOT = Path(__file__).parents[2]
DIALOGUES = ROOT / "tests/data/coffee_orders_valid.jsonl"
TOOLS = json.loads((ROOT / "plugins/models/quire_models/demo/tools.json").read_text())
MAX_TOKENS = 200


@contextlib.contextmanager
def served(url: str | None) -> Iterator[str]:
    """Yield the address of a server; start one where none is given."""
    if url is not None:
        yield url
        return
    command = [sys.executable, "-m", "quire", "serve", "demo", "--port", "0"]
    command += ["--tool-call-parser", "demo", "--enable-auto-tool-choice"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            ready = None
            while ready is None:
                line = process.stderr.readline()
                assert line, "the server ended"
                ready = re.search(r"ready: (http://\S+) ", line)
            # Its lines have to go somewhere, or it would wait.
            ThreadPoolExecutor(1).submit(process.stderr.read)
            yield ready[1]
        finally:
            process.terminate()


def turns(dialogues: list[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Yield every assistant message and what comes before it."""
    for dialogue in dialogues:
        messages = dialogue["messages"]
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                yield messages[:index], message


def ask(client: openai.OpenAI, given: Any, *, stream: bool) -> tuple[str, list[tuple[str, str]]]:
    """Return the finish reason, and the name and the arguments' text of each call."""
    common: dict[str, Any] = {"model": "demo", "max_tokens": MAX_TOKENS, **given}
    if not stream:
        choice = client.chat.completions.create(**common).choices[0]
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
        return choice.finish_reason, calls
    found: list[list[str]] = []
    reason = ""
    for chunk in client.chat.completions.create(**common, stream=True):
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.function.name:
                found.append([call.function.name, ""])
            found[call.index][1] += call.function.arguments or ""
    return reason, [(name, text) for name, text in found]


def score(recorded: dict[str, Any], reason: str, calls: list[tuple[str, str]]) -> dict[str, bool]:
    """Compare an answer with the recorded message; a key is left out where it does not apply."""
    scores = {}
    if calls:
        scores["every call's arguments parse"] = all(parse(text) is not None for _, text in calls)
        scores["every call's arguments fulfil its schema"] = all(is_valid(*call) for call in calls)
    if not recorded.get("tool_calls"):
        return scores | {"text where text was recorded": not calls}
    function = recorded["tool_calls"][0]["function"]
    name, text = calls[0] if calls else ("", "")
    scores |= {
        "finish_reason is tool_calls": reason == "tool_calls",
        "name": name == function["name"],
        "name and arguments": name == function["name"]
        and parse(text) == json.loads(function["arguments"]),
    }
    return scores


def is_valid(name: str, text: str) -> bool:
    """Whether arguments fulfil their function's schema."""
    schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == name)
    value = parse(text)
    return value is not None and jsonschema.Draft202012Validator(schema).is_valid(value)


def parse(text: str) -> Any:
    """Return a JSON text's value, None where it has none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def tools(*, strict: bool) -> list[dict[str, Any]]:
    """Return the functions, strict ones where asked for."""
    more = {"strict": True} if strict else {}
    return [{**tool, "function": {**tool["function"], **more}} for tool in TOOLS]


def main() -> None:
    """Ask for every turn and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialogues", type=Path, default=DIALOGUES)
    parser.add_argument("--limit", type=int, help="dialogues to take")
    parser.add_argument("--url", help="a server that runs, with --tool-call-parser demo")
    parser.add_argument("--strict", action="store_true", help="strict functions")
    parser.add_argument("--tool-choice", choices=["auto", "required"], default="auto")
    parser.add_argument("--temperature", type=float, default=0)
    given = parser.parse_args()
    lines = given.dialogues.read_text().splitlines()[: given.limit]
    todo = list(turns([json.loads(line) for line in lines]))
    if given.tool_choice == "required":
        todo = [turn for turn in todo if turn[1].get("tool_calls")]
    common = {"tools": tools(strict=given.strict), "tool_choice": given.tool_choice}
    common |= {"temperature": given.temperature, "seed": 0}
    held: Counter[str] = Counter()
    total: Counter[str] = Counter()
    with served(given.url) as url, ThreadPoolExecutor(16) as pool:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        begin_s = time.monotonic()
        answers = pool.map(
            lambda numbered: ask(
                client, {**common, "messages": numbered[1][0]}, stream=numbered[0] % 2 == 1
            ),
            enumerate(todo),
        )
        for (_, recorded), (reason, calls) in zip(todo, answers, strict=True):
            for what, holds in score(recorded, reason, calls).items():
                held[what] += holds
                total[what] += 1
        took_s = time.monotonic() - begin_s
    print(f"{len(lines)} dialogues, {len(todo)} turns, {took_s:.1f} s")
    for what, count in sorted(total.items()):
        print(f"{what}: {held[what]}/{count} = {held[what] / count:.1%}")


if __name__ == "__main__":
    main()
