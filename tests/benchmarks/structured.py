"""What forms cost: `python tests/benchmarks/structured.py`, a batch with and without, in turn.

Every request has a schema of its own, new to both processes, and the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time

from quire import LLM, SamplingParams


def schema(number: int) -> dict[str, object]:
    """Return a schema whose answers are longer than is generated."""
    text = {"type": "string", "minLength": 2000}
    return {
        "type": "object",
        "properties": {f"name{number}": {"enum": ["a", number]}, "text": text},
        "required": [f"name{number}", "text"],
        "additionalProperties": False,
    }


def run(llm: LLM, params: list[SamplingParams]) -> tuple[float, float, float]:
    """Return seconds to check, to the first token of all, and a step after that (median)."""
    inputs, engine = llm.frontend.inputs, llm.engine
    begin = time.perf_counter()
    requests = [
        inputs.process(f"Hello {i}", own, request_id=str(next(llm._numbers)))
        for i, own in enumerate(params)
    ]
    checked = time.perf_counter()
    for request in requests:
        engine.add_request(request)
    waiting = {request.request_id for request in requests}
    while waiting:
        waiting -= {update.request_id for update in engine.step()}
    first = time.perf_counter()
    steps = []
    while engine.has_unfinished():
        before = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - before)
    return checked - begin, first - checked, statistics.median(steps[:-1])


def main() -> None:
    """Print one line a round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    llm = LLM(given.model, max_num_seqs=given.batch)
    # The first form starts a process and loads the engine.
    run(llm, [SamplingParams(max_tokens=8, structured_outputs={"regex": "[ab]{20}"})])
    for number in range(given.rounds):
        common = {"max_tokens": given.tokens, "temperature": 1.0}
        free = run(llm, [SamplingParams(ignore_eos=True, **common)] * given.batch)
        seeds = range(number * given.batch, (number + 1) * given.batch)
        limited = [SamplingParams(structured_outputs={"json": schema(s)}, **common) for s in seeds]
        new, again = run(llm, limited), run(llm, limited)
        for name, found in (("free", free), ("new forms", new), ("known forms", again)):
            check, first, step = (1000 * value for value in found)
            print(f"{name:12} check {check:7.1f} ms  first {first:7.1f} ms  step {step:6.2f} ms")
    llm.frontend.close()


if __name__ == "__main__":
    main()
