"""What forms cost: `python tests/benchmarks/structured.py`, a batch with and without, in turn.

Every request has a schema of its own, new to both processes, and the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import wait
from pathlib import Path

from quire import LLM, SamplingParams


def text(number: int) -> dict[str, object]:
    """Return a schema of one long text, whose length is counted: few masks cost more."""
    long = {"type": "string", "minLength": 2000}
    return _object({f"name{number}": {"enum": ["a", number]}, "text": long})


def fields(number: int) -> dict[str, object]:
    """Return a schema of many short values of all kinds."""
    item = _object(
        {
            f"k{number}": {"enum": ["red", "green", "blue", number]},
            "n": {"type": "integer", "minimum": 0, "maximum": 1000 + number},
            "p": {"type": "string", "pattern": "^[a-c]{1,4}x$"},
            "t": {"type": "string", "maxLength": 12},
            "b": {"type": "boolean"},
        }
    )
    return {"type": "array", "minItems": 200, "items": item}


def plain(number: int) -> dict[str, object]:
    """Return an ordinary schema: names, numbers, choices and texts without a bound."""
    address = _object({"street": {"type": "string"}, "zip": {"type": "string"}})
    return _object(
        {
            f"name{number}": {"type": "string"},
            "address": address,
            "kind": {"enum": ["a", "b", f"c{number}"]},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 50},
        }
    )


def _object(properties: dict[str, object]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# Answers are longer than what is generated.
FORMS = {"text": text, "fields": fields, "plain": plain}


def run(llm: LLM, params: list[SamplingParams]) -> dict[str, float]:
    """Return seconds to check, to compile, to the first token of all, and of a step after that.

    Of steps the median, and the processor's time, which other work on the machine changes less.
    """
    inputs, engine = llm.frontend.inputs, llm.engine
    begin = time.perf_counter()
    llm.frontend.check_forms(params, engine.begin_grammar)
    requests = [
        inputs.process(f"Hello {i}", own, request_id=str(next(llm._numbers)))
        for i, own in enumerate(params)
    ]
    checked = time.perf_counter()
    wait([form for request in requests if (form := engine.begin_form(request))])
    for request in requests:
        engine.add_request(request)
    compiled = time.perf_counter()
    waiting = {request.request_id for request in requests}
    while waiting:
        waiting -= {update.request_id for update in engine.step()}
    first = time.perf_counter()
    steps, processor = [], []
    while engine.has_unfinished():
        before, before_on_processor = time.perf_counter(), time.process_time()
        engine.step()
        steps.append(time.perf_counter() - before)
        processor.append(time.process_time() - before_on_processor)
    return {
        "check": checked - begin,
        "compile": compiled - checked,
        "first": first - compiled,
        "step": statistics.median(steps[:-1] or [0.0]),
        "processor's": statistics.median(processor[:-1] or [0.0]),
    }


def with_end_token(folder: Path, into: Path) -> Path:
    """Return a folder whose config.json names an end token: this one, or a copy of that file."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("eos_token_id") is not None:
        return folder
    (into / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    return into


def main() -> None:
    """Start the engine that was asked for, and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--form", choices=FORMS, default="text")
    parser.add_argument("--tokenizer", help="a folder, for a model with random weights")
    given = parser.parse_args()
    if given.tokenizer is None:
        measure(LLM(given.model, max_num_seqs=given.batch), given)
        return
    # Of a model with random weights no more than config.json is needed.
    with tempfile.TemporaryDirectory() as made:
        model = str(with_end_token(Path(given.model), Path(made)))
        options = {"tokenizer": given.tokenizer, "load_format": "dummy"}
        measure(LLM(model, max_num_seqs=given.batch, **options), given)


def measure(llm: LLM, given: argparse.Namespace) -> None:
    """Print one line a round and kind of request."""
    # The first form starts a process and loads the engine.
    run(llm, [SamplingParams(max_tokens=8, structured_outputs={"regex": "[ab]{20}"})])
    for number in range(given.rounds):
        common = {"max_tokens": given.tokens, "temperature": 1.0}
        free = run(llm, [SamplingParams(ignore_eos=True, **common)] * given.batch)
        seeds = range(number * given.batch, (number + 1) * given.batch)
        make = FORMS[given.form]
        limited = [SamplingParams(structured_outputs={"json": make(s)}, **common) for s in seeds]
        new, again = run(llm, limited), run(llm, limited)
        for name, found in (("free", free), ("new forms", new), ("known forms", again)):
            shown = (f"{what} {1000 * value:7.2f} ms" for what, value in found.items())
            print(f"{name:12}", *shown)
    llm.frontend.close()


if __name__ == "__main__":
    main()
