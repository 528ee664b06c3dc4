"""When running sequences give up the blocks that their windows have left behind."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from quire.scheduling.block_manager import BlockManager
from quire.scheduling.sequence import Sequence
from quire.scheduling.step import Step


class Windows:
    """Frees blocks behind windows for the scheduler, none that a step in flight reads.

    A sequence frees its own before it asks for more; those of all others are freed where blocks
    are wanted: by a sequence that goes short, or by one that waits to be admitted.
    """

    def __init__(self, blocks: BlockManager, in_flight: Collection[Step]) -> None:
        self._blocks = blocks
        self._in_flight = in_flight

    def leave(self, sequence: Sequence, step: Step, *, spares_forks: bool = True) -> bool:
        """Free what no token reads that is not collected; True where there was anything.

        Siblings that wait to fork read from the prompt's end on.
        """
        if not self._blocks.windows:
            return False
        dispatched = self._num_in_flight(sequence) + step.num_scheduled_tokens(sequence)
        position = sequence.num_computed_tokens - dispatched
        if spares_forks and sequence.num_to_fork:
            position = min(position, sequence.num_prompt_tokens - 1)
        return self._blocks.leave_behind(sequence, position)

    def leave_all(
        self, running: Iterable[Sequence], step: Step, *, spares_forks: bool = True
    ) -> bool:
        """Let all leave what they can do without; True where there was anything.

        A sequence that has blocks for a part of its tokens only keeps them until it asks for
        more, which takes their place: it must not be short of blocks before it has a token.
        """
        if not self._blocks.windows:
            return False
        leaving = [
            sequence
            for sequence in running
            if sequence.num_computed_tokens >= sequence.next_leave_at
            and sequence.num_reserved_tokens >= sequence.num_tokens
        ]
        return any([self.leave(s, step, spares_forks=spares_forks) for s in leaving])

    def make_room(self, needy: Sequence, running: Iterable[Sequence], step: Step) -> bool:
        """Leave what waits for forks, too, as a sequence goes short; True where there was any."""
        has_left = self.leave(needy, step, spares_forks=False)
        return self.leave_all(running, step, spares_forks=False) or has_left

    def frees_later(self, sequence: Sequence) -> bool:
        """Whether it can free more when steps in flight are collected: better wait than preempt."""
        return bool(self._blocks.windows) and self._num_in_flight(sequence) > 0

    def _num_in_flight(self, sequence: Sequence) -> int:
        return sum([step.num_scheduled_tokens(sequence) for step in self._in_flight])
