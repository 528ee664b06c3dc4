"""Turn a scheduler's difference into a step's Batch; rows of sequences persist between steps.

All integers of a step lie in one packed int32 buffer and go to the device in one copy. The work
is vectorised over rows and does not grow with the length of the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import define
from torch import Tensor

from quire.execution.adjustments import to_device
from quire.execution.block_tables import BlockTables, Ints
from quire.execution.staging import Staging
from quire.interfaces.attention import BatchLimits
from quire.interfaces.batch import Batch, GroupBatch
from quire.scheduling.output import AddedSequence, KVCacheGroup, SchedulerOutput


@define(kw_only=True)
class PromptRows:
    """Tokens of prompts whose log-probabilities are wanted, all sequences end to end.

    `places` are rows of `logit_rows` whose logits foretell `target_ids`; `num_top` is each row's
    number of best tokens. `counts` says how many rows belong to each sequence id, also none.
    """

    places: list[int]
    target_ids: list[int]
    num_top: list[int]
    counts: dict[int, int]


@define(kw_only=True)
class BuiltBatch:
    """A batch and whose logits are sampled: sequence ids, rows and positions of the new tokens.

    `sampled_places` are the sampled ones' places in `logit_rows`, None where those are all.
    """

    batch: Batch
    sampled_ids: list[int]
    sampled_rows: list[int]
    sampled_positions: Ints
    sampled_places: list[int] | None = None
    prompt: PromptRows | None = None


@define(kw_only=True)
class StepCounts:
    """A step's sequences and tokens on the host; `sampled` are places in `ids`.

    `tokens` are the columns that have an entry a token: id, position, row to read the id from (-1:
    none), and the slot of each group. `logit_rows` are the sampled sequences' last tokens.
    """

    ids: list[int]
    rows: Ints
    query_lens: Ints
    seq_lens: Ints
    cu_seqlens: Ints
    tokens: list[Ints]
    sampled: list[int]
    logit_rows: Ints


def wants_prompt_logprobs(added: AddedSequence) -> bool:
    """Whether a sequence's prompt is still to be scored: the first one's, before any token."""
    return (
        added.params.prompt_logprobs is not None
        and added.index == 0
        and len(added.token_ids) == added.num_prompt_tokens
    )


class BatchBuilder:
    """Keep the persistent rows and build batches from them.

    Row `max_num_seqs` belongs to nobody: rows that pad a batch name it.
    """

    def __init__(
        self, groups: Sequence[KVCacheGroup], limits: BatchLimits, device: torch.device
    ) -> None:
        rows = self.padding_row = limits.max_num_seqs
        self.device = device
        self.row_of: dict[int, int] = {}
        self.tables = BlockTables(groups, limits, device)
        self.num_groups = len(groups)
        self._computed = np.zeros(rows, np.int32)
        self._num_known = np.zeros(rows, np.int32)
        self._known: list[Ints] = [np.zeros(0, np.int32) for _ in range(rows)]
        self._prompts: dict[int, int] = {}  # row to number of best tokens, where prompts are scored
        # The last sampled token of each row; a step's own inputs are read from here, so that the
        # host need not know them yet.
        self.last_tokens = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.num_buffers = limits.max_steps_in_flight + 1
        self.staging = Staging(self.num_buffers, device)

    def apply_difference(self, output: SchedulerOutput) -> None:
        """Take over which rows end, begin and grow."""
        for sequence_id in output.finished:
            self.row_of.pop(sequence_id, None)
        for sequence_id in output.preempted:
            self.row_of.pop(sequence_id, None)
        for added in output.added:
            self._add(added)
        for added in output.resumed:
            self._add(added)
        for sequence_id, new_blocks in output.new_block_ids.items():
            row = self.row_of[sequence_id]
            for group, block_ids in enumerate(new_blocks):
                self.tables.append(group, row, block_ids)
        for sequence_id, changes in output.table_changes.items():
            for group, begin, block_ids in changes:
                self.tables.change(group, self.row_of[sequence_id], begin, block_ids)
        if output.chosen_token_ids:
            self._choose(output.chosen_token_ids)

    def _choose(self, chosen: dict[int, int]) -> None:
        """Replace the last tokens of beams, which their search chose."""
        rows = [self.row_of[sequence_id] for sequence_id in chosen]
        given = to_device([rows, list(chosen.values())], torch.int32, str(self.device))
        self.last_tokens.index_copy_(0, given[0].long(), given[1])

    def _add(self, added: AddedSequence) -> None:
        row = added.row
        self.row_of[added.sequence_id] = row
        self._known[row] = np.array(added.token_ids, np.int32)
        self._num_known[row] = len(added.token_ids)
        self._computed[row] = added.num_computed_tokens
        self._prompts.pop(row, None)
        if wants_prompt_logprobs(added):
            self._prompts[row] = added.params.prompt_logprobs or 0
        self.tables.clear(row)
        for group, block_ids in enumerate(added.block_tables):
            self.tables.append(group, row, block_ids)

    @property
    def scores_prompts(self) -> bool:
        """Whether the log-probabilities of any prompt are still to be made."""
        return bool(self._prompts)

    def rows_of(self, output: SchedulerOutput) -> Ints:
        """Return the persistent row of each sequence of a step."""
        row_of = self.row_of
        rows = [row_of[sequence_id] for sequence_id in output.num_scheduled_tokens]
        return np.array(rows, np.int32)

    def sampled_rows(self, output: SchedulerOutput) -> list[int]:
        """Return the rows of the sequences that a step samples, in the order of its logits."""
        return [self.row_of[i] for i in output.num_scheduled_tokens if i in output.samples]

    def advance(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Count one more token a row as computed; return its position, and tokens that are known.

        Those are (rows, token ids) whose token the host has, and the device perhaps not.
        """
        positions = self._computed[rows]
        self._computed[rows] += 1
        known = rows[positions < self._num_known[rows]]
        tokens = [self._known[row][self._computed[row] - 1] for row in known.tolist()]
        return positions, known, np.array(tokens, np.int32)

    def count(self, output: SchedulerOutput) -> StepCounts:
        """Count the tokens of a step as computed, whose difference was applied."""
        rows = self.rows_of(output)
        query_lens = np.array(list(output.num_scheduled_tokens.values()), np.int32)
        starts = self._computed[rows]
        ids = list(output.num_scheduled_tokens)
        ends = np.cumsum(query_lens, dtype=np.int32)
        cu_seqlens = np.zeros(len(ids) + 1, np.int32)
        cu_seqlens[1:] = ends
        sampled = [i for i, sequence_id in enumerate(ids) if sequence_id in output.samples]
        self._computed[rows] = starts + query_lens
        return StepCounts(
            ids=ids,
            rows=rows,
            query_lens=query_lens,
            seq_lens=starts + query_lens,
            cu_seqlens=cu_seqlens,
            tokens=self._tokens(rows, query_lens, starts, ends),
            sampled=sampled,
            logit_rows=ends[sampled] - 1,
        )

    def build(self, output: SchedulerOutput) -> BuiltBatch:
        """Build the batch of `output.num_scheduled_tokens`, whose difference was applied."""
        step = self.count(output)
        prompt = sampled_places = None
        if self._prompts:
            prompt, wanted = self._prompt_rows(step)
            # In the order of the tokens: a model may return the rows that it is asked for.
            every = np.union1d(step.logit_rows, wanted).astype(np.int32)
            if prompt is not None:
                prompt.places = np.searchsorted(every, wanted).tolist()
                sampled_places = np.searchsorted(every, step.logit_rows).tolist()
                step.logit_rows = every
        return BuiltBatch(
            batch=self._to_batch(step, output.step_id),
            sampled_ids=[step.ids[i] for i in step.sampled],
            sampled_rows=step.rows[step.sampled].tolist(),
            sampled_positions=step.seq_lens[step.sampled],
            sampled_places=sampled_places,
            prompt=prompt,
        )

    def _prompt_rows(self, step: StepCounts) -> tuple[PromptRows | None, Ints]:
        """Return the prompts' tokens to score, and whose logits are wanted for that."""
        found = PromptRows(places=[], target_ids=[], num_top=[], counts={})
        wanted: list[Ints] = [np.zeros(0, np.int32)]
        for i, row in enumerate(step.rows.tolist()):
            num_top = self._prompts.get(row)
            if num_top is None:
                continue
            count = int(step.query_lens[i])
            start = int(step.seq_lens[i]) - count
            # The prompt's last token foretells what is sampled.
            targets = self._known[row][start + 1 : start + 1 + count].tolist()
            if start + count >= self._num_known[row]:
                del self._prompts[row]
            begin = step.cu_seqlens[i]
            wanted.append(np.arange(begin, begin + len(targets), dtype=np.int32))
            found.target_ids += targets
            found.num_top += [num_top] * len(targets)
            found.counts[step.ids[i]] = len(targets)
        return (found if found.counts else None), np.concatenate(wanted)

    def _tokens(self, rows: Ints, query_lens: Ints, starts: Ints, ends: Ints) -> list[Ints]:
        """Return what belongs to each token: id, position, row to read from, slots by group.

        The row to read from is the row's number where the token is still on the device only, and
        -1 where the host knows it.
        """
        single = int(query_lens.max()) == 1
        if single:
            positions, rows_of_tokens = starts, rows
        else:
            rows_of_tokens = np.repeat(rows, query_lens)
            offsets = np.repeat(starts - (ends - query_lens), query_lens)
            positions = np.arange(ends[-1], dtype=np.int32) + offsets
        on_device = positions >= self._num_known[rows_of_tokens]
        token_ids = np.zeros(len(positions), np.int32)
        if not on_device.all():
            for row, start, length, end in zip(rows, starts, query_lens, ends, strict=True):
                known = self._known[row][start : start + length]
                token_ids[end - length : end - length + len(known)] = known
        sources = np.where(on_device, rows_of_tokens, np.int32(-1))
        groups = range(self.num_groups)
        slots = [self.tables.slots(group, rows_of_tokens, positions) for group in groups]
        return [token_ids, positions, sources, *slots]

    def _to_batch(self, step: StepCounts, step_id: int) -> Batch:
        """Pack all parts into one buffer, copy it to the device and cut it up again."""
        parts = [*step.tokens, step.cu_seqlens, step.seq_lens, step.logit_rows, step.rows]
        slot = step_id % self.num_buffers
        changes = self.tables.take_changes()
        packed = [*parts, *(ints for _, places, ids in changes for ints in (places, ids))]
        views = self.staging.upload(packed, slot).split([len(part) for part in packed])
        first_slots, first_lens = 3, 3 + self.num_groups
        token_ids, positions, sources = views[:first_slots]
        cu_seqlens, lens, logit_rows, device_rows = views[first_lens : first_lens + 4]
        for i, (group, _, _) in enumerate(changes):
            at = len(parts) + 2 * i
            self.tables.tell_device(group, views[at], views[at + 1])
        longest = int(step.seq_lens.max())
        groups = tuple(
            GroupBatch(
                block_table=self.tables.gather(group, device_rows, longest),
                slot_mapping=views[first_slots + group],
            )
            for group in range(self.num_groups)
        )
        return Batch(
            token_ids=self._with_device_tokens(token_ids, sources, parts[2]),
            positions=positions,
            cu_seqlens_q=cu_seqlens,
            seq_lens=lens,
            logit_rows=logit_rows,
            rows=device_rows,
            groups=groups,
            query_lens=step.query_lens.tolist(),
            seq_lens_bound=step.seq_lens.tolist(),
            num_single_token_seqs=int((step.query_lens == 1).sum()),
            padded_to=len(step.rows),
            in_flight_slot=slot,
        )

    def _with_device_tokens(self, token_ids: Tensor, sources: Tensor, on_host: Ints) -> Tensor:
        """Fill in the tokens that only the device knows."""
        if (on_host >= 0).all():
            return self.last_tokens.index_select(0, sources)
        if (on_host < 0).all():
            return token_ids
        sampled = self.last_tokens.index_select(0, sources.clamp(min=0))
        return torch.where(sources >= 0, sampled, token_ids)
