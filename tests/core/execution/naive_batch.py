"""A scheduler's life drawn at random, and what each step's batch must be, token by token."""

from __future__ import annotations

import random

import torch
from attrs import Factory, define

from quire.execution.batch_builder import BatchBuilder, BuiltBatch
from quire.interfaces.attention import BatchLimits
from quire.request import SamplingParams
from quire.scheduling.output import AddedSequence, KVCacheGroup, SchedulerOutput

VOCAB_SIZE = 1000


@define(kw_only=True)
class NaiveSequence:
    """All that is true of one sequence; `token_ids` includes what only the device knows."""

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    row: int = 0
    tables: list[list[int]] = Factory(list)


def make_groups(block_sizes: list[int]) -> list[KVCacheGroup]:
    """Return one group a block size."""
    return [
        KVCacheGroup(layers=(i,), block_size=size, bytes_per_block=1, num_blocks=10_000)
        for i, size in enumerate(block_sizes)
    ]


@define(kw_only=True)
class NaiveScheduler:
    """Draw differences: who comes, goes, is preempted, comes back, and how many tokens."""

    random: random.Random
    block_sizes: list[int]
    limits: BatchLimits
    running: list[NaiveSequence] = Factory(list)
    preempted: list[NaiveSequence] = Factory(list)
    next_id: int = 100
    step_id: int = 0

    def step(self) -> SchedulerOutput:
        """Draw one step's difference; `running` are the sequences after it."""
        self.step_id += 1
        output = SchedulerOutput(step_id=self.step_id)
        rows = set(range(self.limits.max_num_seqs)) - {s.row for s in self.running}
        for sequence in self.random.sample(self.running, k=len(self.running)):
            fate = self.random.random()
            if fate < 0.1 or len(sequence.token_ids) >= self.limits.max_model_len:
                output.finished.append(sequence.sequence_id)
            elif fate < 0.2:
                output.preempted.append(sequence.sequence_id)
                self.preempted.append(sequence)
            else:
                continue
            self.running.remove(sequence)
            rows.add(sequence.row)
        while rows and (not self.running or self.random.random() < 0.6):
            self._admit(rows, output)
        self._schedule_tokens(output)
        return output

    def _admit(self, rows: set[int], output: SchedulerOutput) -> None:
        resumes = bool(self.preempted) and self.random.random() < 0.5
        if resumes:
            sequence = self.preempted.pop(0)
        else:
            length = self.random.randint(1, self.limits.max_model_len - 1)
            tokens = [self.random.randrange(VOCAB_SIZE) for _ in range(length)]
            sequence = NaiveSequence(
                sequence_id=self.next_id, token_ids=tokens, num_prompt_tokens=length
            )
            self.next_id += 1
        sequence.row = self.random.choice(sorted(rows))
        rows.remove(sequence.row)
        # A prefix hit: some of the tokens are computed already, never the last.
        sequence.num_computed = self.random.randint(0, len(sequence.token_ids) - 1)
        sequence.tables = [[] for _ in self.block_sizes]
        self._grow(sequence, sequence.num_computed)
        (output.resumed if resumes else output.added).append(added(sequence))
        self.running.append(sequence)

    def _grow(self, sequence: NaiveSequence, num_tokens: int) -> list[list[int]]:
        new = []
        for table, size in zip(sequence.tables, self.block_sizes, strict=True):
            count = max(0, -(-num_tokens // size) - len(table))
            new.append([self.random.randrange(1, 10_000) for _ in range(count)])
            table += new[-1]
        return new

    def _schedule_tokens(self, output: SchedulerOutput) -> None:
        chosen = []
        for sequence in self.random.sample(self.running, self.random.randint(1, len(self.running))):
            left = len(sequence.token_ids) - sequence.num_computed
            chosen.append((sequence, self.random.choice([1, left, self.random.randint(1, left)])))
        for sequence, count in sorted(chosen, key=lambda pair: pair[1] > 1):
            end = sequence.num_computed + count
            new = self._grow(sequence, end)
            if any(new):
                output.new_block_ids[sequence.sequence_id] = new
            output.num_scheduled_tokens[sequence.sequence_id] = count
            if end == len(sequence.token_ids):
                output.samples.add(sequence.sequence_id)

    def finish_step(self, output: SchedulerOutput, builder: BatchBuilder) -> None:
        """Count the step as computed; tokens are sampled on the device as the runner does."""
        for sequence in self.running:
            sequence.num_computed += output.num_scheduled_tokens.get(sequence.sequence_id, 0)
            if sequence.sequence_id in output.samples:
                token_id = self.random.randrange(VOCAB_SIZE)
                sequence.token_ids.append(token_id)
                builder.last_tokens[sequence.row] = token_id


def added(sequence: NaiveSequence, **other: object) -> AddedSequence:
    """Return what the scheduler says of a sequence that takes a row."""
    values = {
        "sequence_id": sequence.sequence_id,
        "request_id": f"r{sequence.sequence_id}",
        "index": 0,
        "row": sequence.row,
        "token_ids": list(sequence.token_ids),
        "num_prompt_tokens": sequence.num_prompt_tokens,
        "num_computed_tokens": sequence.num_computed,
        "block_tables": [list(table) for table in sequence.tables],
        "params": SamplingParams(),
        "seed": 0,
    }
    return AddedSequence(**{**values, **other})  # type: ignore[arg-type]


def expected_batch(
    scheduler: NaiveScheduler, output: SchedulerOutput
) -> dict[str, list[int] | list[list[int]]]:
    """Return every field of the batch, worked out one token at a time."""
    by_id = {s.sequence_id: s for s in scheduler.running}
    names = ("token_ids", "positions", "seq_lens", "logit_rows", "rows", "query_lens")
    want: dict[str, list] = {name: [] for name in names}
    want |= {"cu_seqlens_q": [0], "sampled_ids": [], "sampled_rows": [], "sampled_positions": []}
    want["slots"] = [[] for _ in scheduler.block_sizes]
    for sequence_id, count in output.num_scheduled_tokens.items():
        sequence = by_id[sequence_id]
        for position in range(sequence.num_computed, sequence.num_computed + count):
            want["token_ids"].append(sequence.token_ids[position])
            want["positions"].append(position)
            for i, size in enumerate(scheduler.block_sizes):
                block = sequence.tables[i][position // size]
                want["slots"][i].append(block * size + position % size)
        end = sequence.num_computed + count
        want["query_lens"].append(count)
        want["seq_lens"].append(end)
        want["rows"].append(sequence.row)
        want["cu_seqlens_q"].append(len(want["token_ids"]))
        if sequence_id in output.samples:
            want["logit_rows"].append(len(want["token_ids"]) - 1)
            want["sampled_ids"].append(sequence_id)
            want["sampled_rows"].append(sequence.row)
            want["sampled_positions"].append(end)
    return want


def found_batch(built: BuiltBatch) -> dict[str, list[int] | list[list[int]]]:
    """Return the same fields of a built batch."""
    batch = built.batch
    tensors = ("token_ids", "positions", "seq_lens", "logit_rows", "rows", "cu_seqlens_q")
    for name in tensors:
        assert getattr(batch, name).dtype is torch.int32, name
    found = {name: getattr(batch, name).tolist() for name in tensors}
    return found | {
        "query_lens": batch.query_lens,
        "sampled_ids": built.sampled_ids,
        "sampled_rows": built.sampled_rows,
        "sampled_positions": built.sampled_positions.tolist(),
        "slots": [group.slot_mapping.tolist() for group in batch.groups],
    }
