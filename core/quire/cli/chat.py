"""`quire chat MODEL`: a conversation in the terminal, streamed, with each turn's tokens/s."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from attrs import define

from quire.cli.options import add_options, given_options
from quire.cli.sampling import add_sampling_options, given_sampling
from quire.config import EngineConfig
from quire.errors import ConfigError, RequestError
from quire.frontend import Frontend
from quire.request import SamplingParams

HELP = "Ctrl-D or /exit ends, /new begins again, Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire chat`."""
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools, in OpenAI's form")
    add_sampling_options(parser)
    add_options(parser, without=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Check everything, load, then talk until the input ends."""
    frontend = Frontend(EngineConfig.from_options(given_options(arguments)))
    try:
        given = given_sampling(arguments)
        if not {"max_tokens", "n"} & set(given) and "max_tokens" not in frontend.defaults.sampling:
            given["max_tokens"] = None
        params = frontend.sampling_params(given)
        if params.n != 1:
            raise ConfigError(f"--n is {params.n}; a chat has one answer. Leave it out.")
        frontend.check_generates()
        frontend.require_template()
        tools = _read_tools(arguments.tools)
        return _talk(frontend, params, arguments.system, tools)
    finally:
        frontend.close()


def _read_tools(name: str | None) -> Any:
    if name is None:
        return None
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--tools {name}: cannot be read as JSON ({error}).") from None


def _talk(frontend: Frontend, params: SamplingParams, system: str | None, tools: Any) -> int:
    if sys.stdin is None:
        raise ConfigError("a chat reads standard input, which is closed.")
    from quire.llm import LLM

    beginning = [{"role": "system", "content": system}] if system else []
    # A template that refuses the tools or the system message says so before the model is loaded.
    frontend.render([*beginning, {"role": "user", "content": "hi"}], tools=tools)
    conversation = Conversation(
        llm=LLM.from_frontend(frontend), params=params, tools=tools, messages=list(beginning)
    )
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives `input` editing and history
        print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return 0
        if line.strip() == "/exit":
            return 0
        if line.strip() == "/new":
            conversation.messages = list(beginning)
        elif line.strip():
            conversation.turn(line)


@define(kw_only=True)
class Conversation:
    """A model, and what was said so far."""

    llm: Any
    params: SamplingParams
    tools: Any
    messages: list[dict[str, Any]]

    def turn(self, text: str) -> None:
        """Answer one message; a message that cannot be answered is taken back."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt = self.llm.frontend.render(asked, tools=self.tools)
            answer = self._stream(prompt)
        except RequestError as error:
            print(f"quire: {error} /new begins again.", file=sys.stderr)
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, prompt: Any) -> str:
        """Print the answer as it comes; an interruption keeps what there is."""
        pieces: list[str] = []
        num_tokens, begin = 0, time.monotonic()
        stream = self.llm.stream(prompt, self.params)
        try:
            for delta in stream:
                pieces.append(delta.text)
                num_tokens += len(delta.token_ids)
                print(delta.text, end="", flush=True)
                if delta.error is not None:
                    print(f"\nquire: the answer failed: {delta.error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" [stopped]", end="", flush=True)
        finally:
            stream.close()
        seconds = max(time.monotonic() - begin, 1e-9)
        print(flush=True)
        print(f"[{num_tokens} tokens, {num_tokens / seconds:.1f} tokens/s]", file=sys.stderr)
        return "".join(pieces)
