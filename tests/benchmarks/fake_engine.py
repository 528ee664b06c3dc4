"""A test double of the engine's process: every step gives every request a token, at once."""

from __future__ import annotations

import os
import time

from quire.request import FinishReason, Request, SequenceUpdate
from quire.server.engine_process import main
from quire.server.messages import Ready, StepStats

FIRST, LAST = 300, 4000  # ids of plain words
STEPS_PER_S = float(os.environ.get("FAKE_STEPS_PER_S", "inf"))


class FakeEngine:
    """Counts where an engine computes."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._started: list[str] = []
        self._next_id = FIRST
        self._next_step_s = 0.0

    def begin_form(self, request: Request) -> None:
        return None

    def add_request(self, request: Request) -> None:
        self._left[request.request_id] = request.max_tokens
        self._started.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def finish_sequence(self, request_id: str, index: int, reason: FinishReason) -> None:
        self.abort(request_id)

    def has_unfinished(self) -> bool:
        return bool(self._left)

    def step(self) -> list[SequenceUpdate]:
        pause_s = self._next_step_s - time.perf_counter()
        if pause_s > 0:
            time.sleep(pause_s)
        self._next_step_s = max(self._next_step_s, time.perf_counter() - 0.1) + 1 / STEPS_PER_S
        self._next_id = self._next_id + 1 if self._next_id < LAST else FIRST
        updates = []
        for request_id, left in tuple(self._left.items()):
            update = SequenceUpdate(request_id=request_id, index=0, token_ids=(self._next_id,))
            if left == 1:
                update.finish_reason = FinishReason.LENGTH
                del self._left[request_id]
            else:
                self._left[request_id] = left - 1
            updates.append(update)
        return updates

    def stats(self) -> StepStats:
        count = len(self._left)
        return StepStats(num_running=count, num_blocks=1, num_tokens=count, num_seqs=count)

    def started(self) -> list[str]:
        started, self._started = self._started, []
        return started

    def ready(self, phases_s: dict[str, float]) -> Ready:
        return Ready(
            max_model_len=2048, num_blocks=1, block_size=16, phases_s=phases_s, selections=[]
        )


if __name__ == "__main__":
    main(lambda _launch: (FakeEngine(), {}))
