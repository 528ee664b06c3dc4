"""How long a call takes on its device: replays of a CUDA graph, or plain calls on a CPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

REPLAYS, LEAST_CALLS, MOST_CALLS = 15, 5, 50
# On a CPU calls are measured for so long, in seconds.
CPU_TIME = 0.3
# Launches of one graph take so long, in seconds.
GRAPH_TIME = 0.01
# What a CPU is taken to have where the system does not tell, and the most that is gone round.
CPU_CACHE, MOST_ROTATED = 32 << 20, 256 << 20


@frozen(kw_only=True)
class Times:
    """Seconds of one call, over the rounds that were measured, and how they were."""

    median: float
    low: float
    high: float
    how: str


def cache_bytes(device: torch.device) -> int:
    """Return the size of the L2 of a GPU, of the last cache of a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [CPU_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text[:-1]) << 10 if text.endswith("K") else 0)
    return max(found)


def rotated_bytes(device: torch.device) -> int:
    """Return how much is gone round, so that nothing is in a cache when its turn comes."""
    wanted = 5 * cache_bytes(device)
    return wanted if device.type == "cuda" else min(wanted, MOST_ROTATED)


def measure(call: Callable[[int], Any], copies: int, device: torch.device) -> Times:
    """Time `call(turn)`, whose inputs go round `copies`, after calls that do not count."""
    if device.type != "cuda":
        return _times(_calls(call), "calls")
    call(0)
    torch.cuda.synchronize(device)
    once = _event_seconds(lambda: call(1))
    launches = max(copies, 4, min(40, int(GRAPH_TIME / max(once, 1e-6))))
    try:
        replay = _captured(call, launches)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        # What waits for the device cannot be captured, and is timed with its waiting.
        torch.cuda.synchronize(device)
        turns = [functools.partial(call, turn) for turn in range(launches)]
        return _times([_event_seconds(turn) for turn in turns], "calls")
    taken = [_event_seconds(replay) / launches for _ in range(REPLAYS + 2)]
    return _times(taken[2:], "graph")


def _captured(call: Callable[[int], Any], launches: int) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(launches):
            call(turn)
    return graph.replay


def _calls(call: Callable[[int], Any]) -> list[float]:
    """Return the seconds of single calls, as many as there is time for."""
    call(0)
    taken: list[float] = []
    while len(taken) < LEAST_CALLS or (sum(taken) < CPU_TIME and len(taken) < MOST_CALLS):
        begin = time.perf_counter()
        call(len(taken) + 1)
        taken.append(time.perf_counter() - begin)
    return taken


def _event_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _times(taken: list[float], how: str) -> Times:
    return Times(median=statistics.median(taken), low=min(taken), high=max(taken), how=how)
