"""In a process of its own: from `import quire` to the first token, part by part."""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from typing import Any

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
PROGRAM = """
import time
begin = time.perf_counter()
from quire.benchmark.first_token import main
main(begin)
"""


def main(begin: float) -> None:
    """Read the engine's options as JSON from standard input; write one line of JSON."""
    from quire.errors import QuireError

    warnings.simplefilter("ignore")
    try:
        found = _start(json.load(sys.stdin), begin)
    except QuireError as error:
        found = {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:  # noqa: BLE001  the parent reports it, with this traceback
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}", "exit_code": 1}
    print(json.dumps(found), flush=True)


def _start(options: dict[str, Any], begin: float) -> dict[str, Any]:
    from quire.phases import Phases

    phases = Phases()
    with phases.timed("imports"):
        from quire.config import EngineConfig
        from quire.frontend import Frontend
        from quire.llm import LLM
        from quire.request import SamplingParams

    frontend = Frontend(EngineConfig.from_options(options), phases)
    llm = LLM.from_frontend(frontend)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with phases.timed("first token"):
        prompt = [token % llm.engine.runner.vocab_size for token in PROMPT]
        llm.generate([prompt], params, use_tqdm=False)
    whole_s = time.perf_counter() - begin
    frontend.close()
    return {"phases_s": phases.seconds, "whole_s": whole_s, **_described(llm)}


def _described(llm: Any) -> dict[str, Any]:
    from quire.benchmark.machine import describe

    engine = llm.engine
    return {
        "machine": describe(engine.runner.device),
        "choices": {choice.kind: choice.used for choice in engine.selections},
    }
