"""Short ways to make requests, schedulers and results in tests."""

from __future__ import annotations

from collections.abc import Sequence as Items

from attrs import define

from quire.config import SchedulerOptions
from quire.request import Request, SamplingParams, SequenceUpdate
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.output import KVCacheGroup, SchedulerOutput, StepResult
from quire.scheduling.scheduler import Scheduler
from quire.scheduling.sequence import Sequence


def make_request(
    request_id: str, prompt: Items[int], *, max_tokens: int = 8, **more: object
) -> Request:
    """Make a request; `n` and `min_tokens` go to its sampling parameters."""
    params = {name: more.pop(name) for name in ("n", "min_tokens") if name in more}
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        max_tokens=max_tokens,
        seed=0,
        **more,
    )


def make_sequence(token_ids: Items[int], *, salt: str = "", max_num_tokens: int = 64) -> Sequence:
    """Make a waiting sequence as the block manager gets it."""
    sequence = Sequence(1, make_request("r", token_ids, cache_salt=salt), 0, max_num_tokens)
    sequence.token_ids = list(token_ids)
    return sequence


def make_group(num_usable: int, block_size: int) -> KVCacheGroup:
    """Make a group with so many blocks that can be allocated."""
    return KVCacheGroup(
        layers=(0,), block_size=block_size, bytes_per_block=1, num_blocks=num_usable + 1
    )


def make_manager(*groups: tuple[int, int], caching: bool = True) -> BlockManager:
    """Make a block manager from (usable blocks, block size) of each group."""
    return BlockManager(
        [make_group(usable, size) for usable, size in groups], enable_prefix_caching=caching
    )


@define
class Harness:
    """A scheduler and a runner that samples token 7 unless told otherwise."""

    scheduler: Scheduler
    manager: BlockManager
    now_s: float = 0.0

    def add(self, request_id: str, prompt: Items[int], **more: object) -> None:
        """Queue a request."""
        self.scheduler.add_request(make_request(request_id, prompt, **more))

    def schedule(self) -> SchedulerOutput:
        """Schedule a step that must have something to do."""
        output = self.scheduler.schedule()
        assert output is not None
        return output

    def collect(
        self, output: SchedulerOutput, *, token: int = 7, errors: dict[int, str] | None = None
    ) -> list[SequenceUpdate]:
        """Give the scheduler the result of a step."""
        token_ids = {sequence_id: [token] for sequence_id in output.samples}
        return self.scheduler.update(
            StepResult(step_id=output.step_id, token_ids=token_ids, errors=errors or {})
        )

    def step(self, *, token: int = 7) -> SchedulerOutput:
        """Schedule and collect one step."""
        output = self.schedule()
        self.collect(output, token=token)
        return output


def make_harness(
    *,
    num_usable: int = 100,
    block_size: int = 4,
    max_model_len: int = 64,
    caching: bool = True,
    manager: BlockManager | None = None,
    **options: object,
) -> Harness:
    """Make a scheduler over one group of blocks, or `manager`; the rest are SchedulerOptions."""
    manager = manager or make_manager((num_usable, block_size), caching=caching)
    harness: Harness
    scheduler = Scheduler(
        SchedulerOptions(**{"max_num_batched_tokens": 2048, **options}),
        manager,
        max_model_len,
        lambda: harness.now_s,
    )
    harness = Harness(scheduler, manager)
    return harness
