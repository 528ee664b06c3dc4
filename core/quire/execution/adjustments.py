"""Bias, penalties and bans of tokens, applied by the core so that every sampler has them.

They come before the loaded logits processors and the sampler, which thus need to know nothing of
them: a sampler that was written earlier is never wrong in silence. The cost is a read and a write
of the asking rows' logits, which a fused kernel could save.
"""

from __future__ import annotations

import numpy as np
import torch
from attrs import define
from torch import Tensor

from quire.execution.staging import to_device
from quire.execution.token_bans import BanPlan, TokenBans
from quire.request import SamplingParams
from quire.scheduling.output import AddedSequence

# One number a token: how often it was generated, and this bit if the prompt has it.
IN_PROMPT = 1 << 30


@define(kw_only=True)
class _Penalised:
    """The rows of a step with penalties; places are rows of the logits. Columns are [rows, 1]."""

    places: Tensor
    rows: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@define(kw_only=True)
class _Biased:
    """What is added to the logits: (places, token ids) and values."""

    places: Tensor
    token_ids: Tensor
    values: Tensor


@define(kw_only=True)
class _Plan:
    rows: list[int]
    penalised: _Penalised | None
    biased: _Biased | None
    banned: BanPlan | None

    @property
    def is_empty(self) -> bool:
        """Whether no row of the step asks for anything."""
        return self.penalised is None and self.biased is None and self.banned is None


class LogitAdjustments:
    """Keep what each persistent row asks for, and count its tokens on the device.

    Bans come last: what is -inf stays so. Source: the order, bias before penalties, and their
    meaning are vLLM's; the repetition penalty
    is Keskar et al., "CTRL", 2019, section 4.1, with Transformers' rule for negative logits.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._device = str(device)
        self._params: dict[int, SamplingParams] = {}  # of the rows that ask for anything
        self._counts: Tensor | None = None  # int32 [num_rows, vocab_size], once it is needed
        self._bans = TokenBans(num_rows, vocab_size, self._device)
        self._plan: _Plan | None = None

    def add(self, added: AddedSequence) -> None:
        """Take over what a sequence asks for that takes a row, and count its known tokens."""
        params = added.params
        is_banned = self._bans.add(added)
        if params.logit_bias is None and not params.has_penalties and not is_banned:
            if self._params.pop(added.row, None) is not None:
                self._plan = None
            return
        self._params[added.row] = params
        self._plan = None
        if params.has_penalties:
            self._count_known(added)

    def _count_known(self, added: AddedSequence) -> None:
        if self._counts is None:
            shape = (self._num_rows, self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        counts = self._counts[added.row].zero_()
        token_ids = to_device(added.token_ids, torch.int64, self._device)
        prompt, generated = token_ids.tensor_split([added.num_prompt_tokens])
        counts.index_fill_(0, prompt, IN_PROMPT)
        counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def asks(self, rows: list[int]) -> bool:
        """Whether any of these rows has its logits adjusted."""
        return bool(self._params) and any(row in self._params for row in rows)

    def apply(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Return the logits [len(rows), vocab_size] of these rows, adjusted in place or in float32.

        Rows that ask for nothing keep their values.
        """
        plan = self._plan_for(rows)
        if plan is None:
            return logits
        if plan.biased is not None or plan.penalised is not None:
            logits = logits.float()
        if plan.biased is not None:
            where = (plan.biased.places, plan.biased.token_ids)
            logits.index_put_(where, plan.biased.values, accumulate=True)
        if plan.penalised is not None:
            self._penalise(logits, plan.penalised)
        if plan.banned is not None:
            self._bans.apply(logits, plan.banned)
        return logits

    def _penalise(self, logits: Tensor, asked: _Penalised) -> None:
        assert self._counts is not None, "a row with penalties was counted"
        counts = self._counts.index_select(0, asked.rows)
        own = logits.index_select(0, asked.places)
        weakened = torch.where(own > 0, own / asked.repetition, own * asked.repetition)
        own = torch.where(counts != 0, weakened, own)
        generated = counts.bitwise_and_(IN_PROMPT - 1)
        own -= generated * asked.frequency
        own -= (generated > 0) * asked.presence
        logits.index_copy_(0, asked.places, own)

    def count(self, token_ids: Tensor, rows: list[int]) -> None:
        """Note the sampled tokens, [len(rows)] on the device, where later steps need them."""
        plan = self._plan_for(rows)
        if plan is not None and plan.banned is not None:
            self._bans.note(token_ids, plan.banned)
        if plan is None or plan.penalised is None:
            return
        assert self._counts is not None, "a row with penalties was counted"
        asked = plan.penalised
        at = asked.rows * self._vocab_size + token_ids.index_select(0, asked.places)
        self._counts.view(-1).index_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def _plan_for(self, rows: list[int]) -> _Plan | None:
        """Return what these rows ask for; mostly the same rows as in the step before."""
        if not self._params:
            return None
        if self._plan is None or self._plan.rows != rows:
            asking = [(i, row) for i, row in enumerate(rows) if row in self._params]
            self._plan = _Plan(
                rows=rows,
                penalised=self._penalised(asking),
                biased=self._biased(asking),
                banned=self._bans.plan(asking),
            )
        plan = self._plan
        return None if plan.is_empty else plan

    def _penalised(self, asking: list[tuple[int, int]]) -> _Penalised | None:
        asking = [(i, row) for i, row in asking if self._params[row].has_penalties]
        if not asking:
            return None
        params = [self._params[row] for _, row in asking]
        numbers = np.array(
            [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
        )
        columns = to_device(numbers, torch.float32, self._device)
        places, rows = to_device(np.array(asking).T, torch.int64, self._device)
        repetition, frequency, presence = columns.split(1, dim=1)
        return _Penalised(
            places=places, rows=rows, repetition=repetition, frequency=frequency, presence=presence
        )

    def _biased(self, asking: list[tuple[int, int]]) -> _Biased | None:
        places: list[int] = []
        token_ids: list[int] = []
        values: list[float] = []
        for i, row in asking:
            bias = self._params[row].logit_bias or {}
            places += [i] * len(bias)
            token_ids += bias
            values += bias.values()
        if not places:
            return None
        index = to_device([places, token_ids], torch.int64, self._device)
        return _Biased(
            places=index[0],
            token_ids=index[1],
            values=to_device(values, torch.float32, self._device),
        )
