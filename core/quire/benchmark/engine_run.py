"""Run requests on an engine in this process, and take down what each step took."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import Factory, define

from quire.benchmark.prompts import Work
from quire.errors import QuireError
from quire.request import SamplingParams

if TYPE_CHECKING:
    from quire.llm import LLM


@define(kw_only=True)
class EngineRun:
    """What happened; times are seconds from the begin. Lists of steps have one entry a step."""

    took_s: float = 0.0
    num_prompt_tokens: int = 0
    token_s: dict[str, list[float]] = Factory(dict)  # of each request, when each token came
    host_s: list[float] = Factory(list)
    num_seqs: list[int] = Factory(list)
    num_step_tokens: list[int] = Factory(list)
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated."""
        return sum(map(len, self.token_s.values()))

    @property
    def num_steps(self) -> int:
        """Steps that were made."""
        return len(self.num_seqs)

    @property
    def first_s(self) -> float:
        """When the last request had its first token."""
        return self.all_have(1)

    def all_have(self, count: int) -> float:
        """Return when every request had so many tokens."""
        return max(times[count - 1] for times in self.token_s.values())


class Bench:
    """Makes requests of work and runs them; `temperature` 0 is greedy."""

    def __init__(self, llm: LLM, temperature: float) -> None:
        self.llm = llm
        self.engine = llm.engine
        self._temperature = temperature
        self._count = 0

    def add(self, works: Sequence[Work]) -> list[str]:
        """Queue requests that end by length alone; return their ids."""
        ids = []
        for work in works:
            params = SamplingParams(
                temperature=self._temperature, max_tokens=work.num_tokens, ignore_eos=True
            )
            self._count += 1
            request = self.llm.frontend.inputs.process(
                work.prompt,
                params,
                request_id=f"bench-{self._count}",
                arrival_s=self.engine.clock(),
            )
            self.engine.add_request(request)
            ids.append(request.request_id)
        return ids

    def run(self, works: Sequence[Work]) -> EngineRun:
        """Run requests to their ends. Raises: QuireError where one fails."""
        engine, run = self.engine, EngineRun()
        # As the server does: what exists now need not be looked at again.
        gc.collect()
        gc.freeze()
        preempted = engine.scheduler.num_preemptions
        begin = time.perf_counter()
        run.token_s = {request_id: [] for request_id in self.add(works)}
        while engine.has_unfinished():
            updates = engine.step()
            now = time.perf_counter() - begin
            for update in updates:
                if update.error is not None:
                    raise QuireError(f"{update.request_id} failed: {update.error}")
                run.token_s[update.request_id] += [now] * len(update.token_ids)
            timing = engine.timing
            run.host_s.append(timing.host_s)
            run.num_seqs.append(timing.num_seqs)
            run.num_step_tokens.append(timing.num_tokens)
        run.took_s = time.perf_counter() - begin
        run.num_prompt_tokens = sum(len(work.prompt) for work in works)
        run.num_preemptions = engine.scheduler.num_preemptions - preempted
        gc.unfreeze()
        return run
