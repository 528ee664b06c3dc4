"""`quire bench serve`: load an OpenAI-compatible server, ours or another's, and measure it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from quire.benchmark.chart import draw
from quire.benchmark.load import (
    Run,
    Target,
    check_installed,
    run_closed,
    run_open,
    served_models,
)
from quire.benchmark.summary import as_table, parse_goodput, summarize
from quire.benchmark.workload import (
    Ask,
    TokenRange,
    chat_body,
    completion_body,
    random_asks,
    read_trace,
    trace_asks,
    with_arrivals,
)
from quire.cli.numbers import COUNT, POSITIVE, number
from quire.errors import ConfigError

KEY_VARIABLE = "OPENAI_API_KEY"
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
EPILOG = """\
closed loop: --concurrency alone keeps so many requests running.
open loop:   --rate sends so many a second, whatever the server does; --burstiness 1 is a Poisson
             process, less comes in bursts. A trace without --rate or --concurrency keeps its own
             times, divided by --trace-speed.
"""


def add_arguments(serve: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire bench serve`."""
    add = serve.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="where it listens, without /v1")
    add("--model", help="its model; not given: the first that it lists")
    add("--api-key", help=f"key to send; not given: {KEY_VARIABLE}")
    add("--endpoint", choices=PATHS, default="completions", help="route; chat sends words")
    add("--num-requests", type=COUNT, default=100, help="requests that are measured")
    add("--warmup", type=number(int, 0), default=8, help="requests before, not measured")
    add("--concurrency", type=COUNT, help="requests that run at once; an upper bound with --rate")
    add("--rate", type=POSITIVE, help="requests a second")
    add("--burstiness", type=POSITIVE, default=1.0, help="shape of the times between requests")
    add("--input-len", type=COUNT, default=128, help="prompt tokens")
    add("--output-len", type=COUNT, default=128, help="tokens to generate")
    add("--spread", type=number(float, 0), default=0.0, help="lengths vary by this share")
    add("--shared-prefix-len", type=number(int, 0), default=0, help="tokens all prompts begin with")
    add("--trace", type=Path, help="JSON lines as Mooncake's, or .csv as Azure's")
    add("--trace-speed", type=POSITIVE, default=1.0, help="replay this many times faster")
    add("--length-scale", type=POSITIVE, default=1.0, help="multiply the trace's lengths")
    add("--max-len", type=number(int, 2), help="cut requests to this; not given: as listed")
    add("--token-ids", default="300:4000", metavar="LOW:HIGH", help="ids that prompts are made of")
    add("--ignore-eos", action="store_true", help="generate all tokens (vLLM's parameter)")
    add("--extra-body", default="{}", metavar="JSON", help="more fields of each request")
    add("--timeout-s", type=POSITIVE, default=600.0, help="for each request")
    add("--goodput", nargs="+", default=(), metavar="NAME:MS", help="limits: ttft, tpot, e2e")
    add("--seed", type=int, default=0, help="of lengths, tokens and times")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", type=Path, metavar="FILE", help="write a diagram of the latencies")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if a request failed. Raises: ConfigError."""
    check_installed()
    limits = parse_goodput(arguments.goodput)
    result = asyncio.run(_measure(arguments))
    figures = summarize(result, limits)
    print(json.dumps(figures) if arguments.json else as_table(figures))
    if arguments.plot is not None:
        draw(result.results, arguments.plot)
    return 1 if figures["failed"] else 0


async def _measure(arguments: argparse.Namespace) -> Run:
    base_url = arguments.base_url.rstrip("/").removesuffix("/v1")
    api_key = arguments.api_key or os.environ.get(KEY_VARIABLE)
    tokens, extra = _token_range(arguments.token_ids), _extra(arguments)
    models = await served_models(base_url, api_key)
    card = _card(models, arguments.model)
    asks = _asks(arguments, arguments.max_len or card.get("max_model_len"), tokens)
    make = chat_body if arguments.endpoint == "chat" else completion_body
    target = Target(
        base_url=base_url,
        path=PATHS[arguments.endpoint],
        write=make(card["id"], extra),
        api_key=api_key,
        timeout_s=arguments.timeout_s,
    )
    if arguments.warmup:
        warm = random_asks(
            arguments.warmup,
            input_len=32,
            output_len=8,
            spread=0.0,
            shared_prefix_len=0,
            tokens=tokens,
            seed=arguments.seed + 1,
        )
        await run_closed(target, warm, concurrency=min(8, arguments.warmup))
    print(f"{len(asks)} requests to {base_url} ...", file=sys.stderr)
    if arguments.rate is None and (arguments.trace is None or arguments.concurrency is not None):
        return await run_closed(target, asks, arguments.concurrency or 1)
    return await run_open(target, asks, arguments.concurrency)


def _asks(arguments: argparse.Namespace, max_len: int | None, tokens: TokenRange) -> list[Ask]:
    if arguments.trace is not None:
        asks = trace_asks(
            read_trace(arguments.trace, arguments.num_requests),
            length_scale=arguments.length_scale,
            speed=arguments.trace_speed,
            max_len=max_len,
            tokens=tokens,
            seed=arguments.seed,
        )
    else:
        asks = random_asks(
            arguments.num_requests,
            input_len=arguments.input_len,
            output_len=arguments.output_len,
            spread=arguments.spread,
            shared_prefix_len=arguments.shared_prefix_len,
            tokens=tokens,
            seed=arguments.seed,
        )
    if arguments.rate is not None:
        asks = with_arrivals(asks, arguments.rate, arguments.burstiness, arguments.seed)
    return asks


def _card(models: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    for card in models:
        if wanted in (None, card.get("id")):
            return card
    names = ", ".join(str(card.get("id")) for card in models)
    raise ConfigError(f"--model is {wanted!r}; the server lists: {names or 'none'}.")


def _token_range(text: str) -> TokenRange:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise ConfigError(f"--token-ids is {text!r}; allowed: LOW:HIGH, such as 300:4000.")
    return TokenRange(low=int(low), high=int(high))


def _extra(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        extra = json.loads(arguments.extra_body)
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra-body is {arguments.extra_body!r}; give a JSON object.")
    return {**extra, **({"ignore_eos": True} if arguments.ignore_eos else {})}
