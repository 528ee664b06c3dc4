"""Decides what each step computes: continuous batching, chunked prefill, preemption.

It counts tokens and knows no phases: every running sequence has tokens that are not computed
yet, one while it decodes, many while its prompt is long, and each step computes some of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from quire.config import SchedulerOptions
from quire.errors import RequestError
from quire.request import FinishReason, Request, SequenceUpdate
from quire.scheduling.admission import Admission
from quire.scheduling.beams import Beams
from quire.scheduling.block_manager import BlockManager
from quire.scheduling.logprobs import add_extras
from quire.scheduling.output import SchedulerOutput, StepResult
from quire.scheduling.queues import SequenceList, WaitingQueue
from quire.scheduling.sequence import Sequence, SequenceStatus
from quire.scheduling.step import Step
from quire.scheduling.updates import end_of, failed_update, last_update
from quire.scheduling.windows import Windows

FINISHED = SequenceStatus.FINISHED
PARKED = SequenceStatus.PARKED
PREEMPTED = SequenceStatus.PREEMPTED
RUNNING = SequenceStatus.RUNNING


class Scheduler:
    """Owns all sequences from `add_request` until they end.

    `schedule` may be called again before the `update` of earlier steps; results come in the order
    of the steps. Sequences are served by standing, best first, and preempted worst first.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        block_manager: BlockManager,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        self.num_preemptions = 0
        self._blocks = block_manager
        self._admission = Admission(options, block_manager, max_model_len, clock)
        assert options.max_num_batched_tokens is not None, "the start knows how many pay"
        self._max_num_batched_tokens = options.max_num_batched_tokens
        self._requests: dict[str, list[Sequence]] = {}  # the sequences that have not ended
        self._waiting = WaitingQueue()
        self._running = SequenceList()
        self._free_rows = list(range(options.max_num_seqs - 1, -1, -1))
        self._finished_ids: list[int] = []  # gave their rows back since the last output
        self._preempted_ids: list[int] = []
        self._in_flight: deque[Step] = deque()
        self._windows = Windows(block_manager, self._in_flight)
        self._next_sequence_id = 0
        self._next_step_id = 1
        self._beams = Beams(
            block_manager, self._waiting, self._requests, self._preempt, self._finish
        )

    @property
    def num_running(self) -> int:
        """Sequences that have a row and blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait: new, preempted, or for their sibling's prompt."""
        return len(self._waiting)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps scheduled and not updated yet."""
        return len(self._in_flight)

    def has_unfinished(self) -> bool:
        """Whether any sequence has not ended. Steps may be in flight even if none."""
        return bool(self._requests)

    # Requests come and go

    def add_request(self, request: Request) -> None:
        """Queue a request; its first sequence computes the prompt, the others fork from it.

        Raises: RequestError where the request can never be served, changing nothing.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request id {request.request_id!r} is in use; give each request its own.",
                parameter="request_id",
            )
        sequences = self._admission.sequences(request, self._next_sequence_id)
        self._next_sequence_id += request.params.num_side_by_side
        self._beams.begin(sequences[0])
        self._requests[request.request_id] = sequences
        self._waiting.add_family(list(sequences))

    def abort(self, request_id: str) -> None:
        """End all sequences of a request; no update follows. An id that has ended is no error."""
        for sequence in list(self._requests.get(request_id, ())):
            self._finish(sequence, FinishReason.ABORT)

    def finish_sequence(self, request_id: str, index: int, reason: FinishReason) -> None:
        """End one sequence for a reason found outside, such as a stop string.

        No update follows: later tokens are discarded. One that has ended already is no error.
        What a beam search found ended with it.
        """
        for sequence in self._requests.get(request_id, ()):
            if sequence.index == index and sequence.beams is None:
                self._finish(sequence, reason)
                return

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is RUNNING:
            self._finished_ids.append(sequence.sequence_id)
            self._stop_running(sequence)
        elif sequence.status is not PARKED:
            self._waiting.remove(sequence)
        sequence.status = FINISHED
        sequence.finish_reason = reason
        sequence.parent = None
        self._waiting.release_siblings_of(sequence)
        unfinished = self._requests[sequence.request_id]
        unfinished.remove(sequence)
        if not unfinished:
            del self._requests[sequence.request_id]

    # A step is planned

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step and count its tokens as computed; None if nothing can be now."""
        step = Step(self._next_step_id)
        self._schedule_running(step)
        if step.admits:
            self._admit_waiting(step)
        for sequence in step.prompts_done:
            self._waiting.release_siblings_of(sequence)
        if step.is_empty and not self._in_flight:
            self._make_way(step)
        if step.is_empty:
            return None
        self._beams.tell(step)
        self._next_step_id += 1
        self._in_flight.append(step)
        output = step.to_output(finished=self._finished_ids, preempted=self._preempted_ids)
        self._finished_ids, self._preempted_ids = [], []
        return output

    def _schedule_running(self, step: Step) -> None:
        """Give each running sequence a token, and long ones what the budget has beyond that."""
        budget = self._max_num_batched_tokens
        turns = self._running.items[:budget]  # a copy: victims leave the list while we walk it
        step.num_spare_tokens = budget - len(turns)
        singles, sampled = step.singles, step.sampled
        for sequence in turns:
            num_tokens = sequence.num_tokens
            if (
                num_tokens <= sequence.steady_until
                and sequence.num_computed_tokens == num_tokens - 1
            ):
                sequence.num_computed_tokens = num_tokens
                sequence.num_tokens = num_tokens + 1
                singles[sequence.sequence_id] = 1
                sampled.append(sequence)
            else:
                step.num_spare_tokens += 1
                self._schedule_one(sequence, step)

    def _schedule_one(self, sequence: Sequence, step: Step) -> None:
        """Schedule a running sequence that needs a block, has many tokens, or may not go on."""
        if sequence.status is not RUNNING or sequence.is_drained:
            return
        if sequence.beams is not None and sequence.num_in_flight_tokens:
            return  # its next token depends on those of the other beams
        num_new = min(sequence.num_tokens - sequence.num_computed_tokens, step.num_spare_tokens)
        end = sequence.num_computed_tokens + num_new
        # Beams share blocks anew after each step.
        has_blocks = end <= sequence.num_reserved_tokens and sequence.beams is None
        if has_blocks or self._find_blocks(sequence, end, step):
            self._take_tokens(sequence, end, step)

    def _take_tokens(self, sequence: Sequence, end: int, step: Step) -> None:
        """Count the tokens up to position `end` as computed in this step."""
        num_new = end - sequence.num_computed_tokens
        step.num_spare_tokens -= num_new
        (step.singles if num_new == 1 else step.chunks)[sequence.sequence_id] = num_new
        sequence.num_computed_tokens = end
        if end < sequence.num_tokens:
            step.unfinished_chunks.append((sequence, end))
            return
        sequence.num_tokens += 1
        if sequence.beams is not None:
            step.beams.append(sequence)
            return
        last = sequence.max_num_tokens - 1
        sequence.steady_until = min(sequence.num_reserved_tokens, last)
        step.sampled.append(sequence)
        if self._waiting.has_siblings_of(sequence):
            step.prompts_done.append(sequence)

    # Blocks run out

    def _find_blocks(self, sequence: Sequence, end: int, step: Step) -> bool:
        """Get a running sequence blocks up to `end`, preempting the worst standing if it must."""
        if not step.admits:
            return False  # a better standing goes without a block in this step
        self._windows.leave(sequence, step)
        while (reservation := self._blocks.reserve(sequence, end)) is None:
            if self._windows.make_room(sequence, self._running, step):
                continue
            step.admits = False
            if self._windows.frees_later(sequence) or self._blocks_are_coming_back():
                return False
            victim = self._running.victim_for(sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        self._beams.add_blocks(sequence, reservation, step)
        return True

    def _blocks_are_coming_back(self) -> bool:
        """Whether a step in flight frees blocks when it is collected: better wait than preempt."""
        return any(step.releases for step in self._in_flight) or any(
            sequence.is_drained and not self._beams.waits(sequence) for sequence in self._running
        )

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._preempted_ids.append(sequence.sequence_id)
        self._stop_running(sequence)
        sequence.status = PREEMPTED
        sequence.num_computed_tokens = 0
        sequence.preempted_in_step = self._in_flight[-1].step_id if self._in_flight else 0
        if not self._beams.parks(sequence):
            self._waiting.add(sequence)
        self._waiting.release_siblings_of(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        """Take row and blocks from a sequence."""
        self._running.remove(sequence)
        assert sequence.row is not None, f"{sequence} runs without a row"
        self._free_rows.append(sequence.row)
        sequence.row = None
        sequence.steady_until = 0
        self._beams.forget(sequence)
        tables = self._blocks.detach(sequence)
        if self._in_flight:
            # Every step in flight may read these blocks, also as the source of a copy.
            self._in_flight[-1].releases.append(tables)
        else:
            self._blocks.give_back(tables)

    def _make_way(self, step: Step) -> None:
        """Let the best standing beam get on where beams wait for others that have no room."""
        self._admit_waiting(step)
        while step.is_empty and (victim := self._beams.in_the_way(self._running)) is not None:
            self._preempt(victim)
            self._admit_waiting(step)

    # Waiting sequences are admitted

    def _admit_waiting(self, step: Step) -> None:
        """Give rows and blocks to waiting sequences; nobody overtakes the one that stands best."""
        if self._waiting.first() is not None:
            self._windows.leave_all(self._running, step)
        while step.num_spare_tokens > 0 and self._free_rows:
            sequence = self._waiting.first()
            if sequence is None or step.is_short_for(sequence):
                return
            if not self._give_blocks(sequence, step):
                return
            self._waiting.remove(sequence)
            self._start_running(sequence, step)

    def _give_blocks(self, sequence: Sequence, step: Step) -> bool:
        """Give a waiting sequence blocks for all its tokens, so that it gets its next one."""
        if sequence.status is PREEMPTED:
            if self._is_in_flight(sequence):
                return False
            if (found := self._beams.find_parent(sequence, step)) is not None:
                return self._share(*found, sequence, step)
            # One block for each running sequence stays free, or it would soon be preempted again.
            return self._blocks.admit(sequence, headroom=len(self._running))
        if not sequence.token_ids:
            sequence.token_ids = list(sequence.request.prompt_token_ids)
        parent = sequence.parent
        if parent is not None and self._has_prompt(parent, step):
            return self._fork(parent, sequence, step)
        if not self._blocks.admit(sequence):
            return False
        sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _is_in_flight(self, preempted: Sequence) -> bool:
        """Whether a step from before its preemption has not been collected."""
        return bool(self._in_flight) and self._in_flight[0].step_id <= preempted.preempted_in_step

    def _has_prompt(self, parent: Sequence, step: Step) -> bool:
        """Whether earlier steps compute the parent's prompt: this one's copies come before it.

        A parent that is far ahead may have left behind what a token after the prompt reads.
        """
        num_prompt, num_computed = parent.num_prompt_tokens, parent.num_computed_tokens
        has_it = num_computed - step.num_scheduled_tokens(parent) >= num_prompt
        return parent.status is RUNNING and has_it and self._blocks.can_fork(parent, num_prompt - 1)

    def _fork(self, parent: Sequence, child: Sequence, step: Step) -> bool:
        """Share the parent's prompt; its last token is computed again to get logits of its own."""
        child.num_cached_tokens = parent.num_cached_tokens
        return self._share(parent, child.num_prompt_tokens - 1, child, step)

    def _share(self, parent: Sequence, num_shared: int, child: Sequence, step: Step) -> bool:
        """Share what the parent computed up to there, with blocks for the rest."""
        if num_shared < child.num_prompt_tokens - 1:
            return False  # a beam that was resumed has not come as far again
        copies = self._blocks.fork_all(parent, child, num_computed_tokens=num_shared)
        step.add_copies(copies or ())
        return copies is not None

    def _start_running(self, sequence: Sequence, step: Step) -> None:
        """Give a sequence that has its blocks a row and its first tokens of this step."""
        is_new = sequence.status is not PREEMPTED
        if not is_new:
            sequence.num_tokens_at_resume = sequence.num_tokens
            sequence.prompt_logprobs = []  # a prompt that was computed in part begins anew
        sequence.parent = None
        sequence.status = RUNNING
        sequence.row = self._free_rows.pop()
        self._running.add(sequence)
        step.add_sequence(sequence, sequence.row, is_new=is_new)
        num_new = min(sequence.num_tokens - sequence.num_computed_tokens, step.num_spare_tokens)
        self._take_tokens(sequence, sequence.num_computed_tokens + num_new, step)

    # A step is collected

    def update(self, result: StepResult) -> list[SequenceUpdate]:
        """Take the result of the oldest step in flight: append tokens, end, cache and free."""
        step = self._in_flight.popleft()
        assert step.step_id == result.step_id, f"step {result.step_id} before {step.step_id}"
        errors = result.errors
        new_token_ids = result.token_ids
        updates = []
        for sequence in step.sampled:
            if sequence.status is FINISHED:
                continue  # what was dispatched before it ended is discarded
            if errors and sequence.sequence_id in errors:
                updates.append(self._fail(sequence, errors))
                continue
            (token_id,) = new_token_ids[sequence.sequence_id]
            token_ids = sequence.token_ids
            token_ids.append(token_id)
            num_tokens = len(token_ids)
            if num_tokens > sequence.next_commit_at:
                self._blocks.commit(sequence, num_tokens - 1)
            if num_tokens == sequence.max_num_tokens or token_id in sequence.stop_token_ids:
                updates.append(self._end_or_go_on(sequence, token_id))
                continue
            updates.append(
                SequenceUpdate(
                    request_id=sequence.request_id,
                    index=sequence.index,
                    token_ids=(token_id,),
                    num_cached_tokens=sequence.num_cached_tokens,
                )
            )
        updates.extend(self._update_chunks(step, errors))
        if result.logprobs or result.prompt_logprobs or result.pooled:
            add_extras(step, result, updates)
        if step.beams:
            updates += self._beams.update(step, result)
        for tables in step.releases:
            self._blocks.give_back(tables)
        return updates

    def _update_chunks(self, step: Step, errors: dict[int, str]) -> list[SequenceUpdate]:
        """Cache the blocks of sequences that have no token yet; return those that failed."""
        failed = []
        for sequence, num_computed_tokens in step.unfinished_chunks:
            if sequence.status is FINISHED:
                continue
            if sequence.sequence_id in errors:
                failed.append(self._fail(sequence, errors))
            elif num_computed_tokens >= sequence.next_commit_at:
                self._blocks.commit(sequence, num_computed_tokens)
        return failed

    def _end_or_go_on(self, sequence: Sequence, token_id: int) -> SequenceUpdate:
        reason = end_of(sequence, token_id)
        if reason is not None:
            self._finish(sequence, reason)
        return last_update(sequence, token_id, reason)

    def _fail(self, sequence: Sequence, errors: dict[int, str]) -> SequenceUpdate:
        self._finish(sequence, FinishReason.ERROR)
        return failed_update(sequence, errors[sequence.sequence_id])
