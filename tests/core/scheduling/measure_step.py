"""Prints the host time of a steady step: schedule() and update() of 256 decoding sequences.

python tests/core/scheduling/measure_step.py
"""

from __future__ import annotations

import statistics
import time

from builders import make_harness

from quire.scheduling.output import StepResult

NUM_SEQUENCES = 256
NUM_STEPS = 600
WARM_UP = 50


def measure(block_size: int) -> tuple[list[float], list[float]]:
    """Return seconds of each schedule() and of each update(); prompts differ in length."""
    harness = make_harness(num_usable=2**16, block_size=block_size, max_model_len=4096)
    for number in range(NUM_SEQUENCES):
        prompt = [number] * (1 + number % block_size)
        stops = frozenset([10**6])
        harness.add(str(number), prompt, max_tokens=NUM_STEPS + WARM_UP, stop_token_ids=stops)
    schedule_s, update_s = [], []
    for _ in range(NUM_STEPS):
        began_s = time.perf_counter()
        output = harness.schedule()
        schedule_s.append(time.perf_counter() - began_s)
        result = StepResult(step_id=output.step_id, token_ids={i: [7] for i in output.samples})
        began_s = time.perf_counter()
        harness.scheduler.update(result)
        update_s.append(time.perf_counter() - began_s)
    return schedule_s[WARM_UP:], update_s[WARM_UP:]


def main() -> None:
    """Measure with blocks of the default size, and with blocks so large that none fills."""
    for block_size in (16, 1024):
        schedule_s, update_s = measure(block_size)
        print(
            f"{NUM_SEQUENCES} sequences, block size {block_size}: "
            f"schedule {statistics.median(schedule_s) * 1e6:.0f} us "
            f"(best {min(schedule_s) * 1e6:.0f}), "
            f"update {statistics.median(update_s) * 1e6:.0f} us (best {min(update_s) * 1e6:.0f})"
        )


if __name__ == "__main__":
    main()
