"""`quire generate MODEL -p TEXT`: complete prompts and print the results."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from quire.cli.options import add_options, given_options
from quire.cli.sampling import add_sampling_options, given_sampling
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.frontend import Frontend
from quire.request import RequestOutput, SamplingParams

DEFAULT_MAX_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire generate`."""
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt; may be repeated; - reads one from standard input",
    )
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt a line: a text, or a JSON object with prompt or prompt_token_ids",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    add_sampling_options(parser)
    add_options(parser, without=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then load, generate and print; 1 if a request failed."""
    frontend = Frontend(EngineConfig.from_options(given_options(arguments)))
    try:
        return _generate(frontend, arguments)
    finally:
        frontend.close()


def _generate(frontend: Frontend, arguments: argparse.Namespace) -> int:
    params = _params(frontend, given_sampling(arguments))
    prompts = read_prompts(arguments)
    if any(isinstance(prompt, str) or "prompt" in prompt for prompt in prompts):
        frontend.require_tokenizer()
    for prompt in prompts:
        # Refused here, before torch is imported, rather than after the model was loaded.
        frontend.inputs.process(prompt, params, request_id="check")
    from quire.llm import LLM

    llm = LLM.from_frontend(frontend)
    outputs = llm.generate(prompts, params, use_tqdm=arguments.progress)
    for number, output in enumerate(outputs):
        print(_as_json(output) if arguments.json else _as_text(output, number, len(outputs)))
    return 1 if any(o.finish_reason == "error" for r in outputs for o in r.outputs) else 0


def _params(frontend: Frontend, given: dict[str, Any]) -> SamplingParams:
    defaults = frontend.defaults.sampling_defaults()
    if "max_tokens" not in given and "max_tokens" not in defaults:
        given["max_tokens"] = max(DEFAULT_MAX_TOKENS, given.get("min_tokens", 0))
    return frontend.sampling_params(given)


def read_prompts(arguments: argparse.Namespace) -> list[Any]:
    """Return the prompts of `-p` and `--prompts-file`, in this order. Raises: ConfigError."""
    prompts: list[Any] = [_read_input() if p == "-" else p for p in arguments.prompt]
    if arguments.prompts_file is not None:
        path = Path(arguments.prompts_file)
        try:
            # Lines end at line feeds only: other separators may stand in a prompt.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts-file {path}: cannot be read ({error}).") from None
        prompts += [_parse_line(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError("no prompt; give one with -p TEXT, -p - or --prompts-file FILE.")
    return prompts


def _read_input() -> str:
    if sys.stdin is None:
        raise ConfigError("-p - reads standard input, which is closed.")
    return sys.stdin.read()


def _parse_line(path: Path, number: int, line: str) -> Any:
    if not line.lstrip().startswith("{"):
        return line
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--prompts-file {path}, line {number}: not JSON ({error}).") from None
    return found


def _as_text(output: RequestOutput, number: int, total: int) -> str:
    texts = []
    for completion in output.outputs:
        several = total > 1 or len(output.outputs) > 1
        head = f"--- prompt {number}, answer {completion.index}\n" if several else ""
        texts.append(head + completion.text)
    return "\n".join(texts)


def _as_json(output: RequestOutput) -> str:
    completions = [
        {
            "index": c.index,
            "text": c.text,
            "token_ids": c.token_ids,
            "finish_reason": c.finish_reason,
            "stop_reason": c.stop_reason,
        }
        for c in output.outputs
    ]
    whole = {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": completions,
        "num_cached_tokens": output.num_cached_tokens,
    }
    return json.dumps(whole, ensure_ascii=False)
