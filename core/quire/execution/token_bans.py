"""Tokens that a row must not draw: those outside its allowed ones, forbidden ones, bad words.

A ban is a logit of -inf. Which tokens are banned for good is a mask on the device; a word of
several tokens is compared with the last generated ones, the token in flight included.
"""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from quire.execution.staging import to_device
from quire.request_checks import MAX_BAD_WORD_TOKENS
from quire.scheduling.output import AddedSequence

NO_TOKEN = -1  # before the first generated one
ANY_TOKEN = -2  # before a word that is shorter than others
WIDTH = MAX_BAD_WORD_TOKENS - 1
LOWEST = float("-inf")


@define(kw_only=True)
class _Words:
    """Words of several tokens: `before` int32 [num_words, width], `last` int64 [num_words]."""

    before: Tensor
    last: Tensor
    width: int


@define(kw_only=True)
class BanPlan:
    """What the rows of a step ask for; places are rows of the logits."""

    masked_places: Tensor
    masked_rows: Tensor
    words: _Words | None = None
    # Of each word, and of each row with words.
    word_places: Tensor | None = None
    word_rows: Tensor | None = None
    places: Tensor | None = None
    rows: Tensor | None = None


class TokenBans:
    """Keep what each persistent row must not say, on the device. Nothing is kept for no row."""

    def __init__(self, num_rows: int, vocab_size: int, device: str) -> None:
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._device = device
        self._masked: set[int] = set()
        self._words: dict[int, _Words] = {}
        self._mask: Tensor | None = None  # bool [num_rows, vocab_size], True: banned
        self._recent: Tensor | None = None  # int32 [num_rows, WIDTH], the latest token last

    def add(self, added: AddedSequence) -> bool:
        """Take over what a sequence asks for that takes a row; return whether it does."""
        row, params = added.row, added.params
        self._masked.discard(row)
        self._words.pop(row, None)
        single = [word[0] for word in added.bad_words_token_ids if len(word) == 1]
        several = [word for word in added.bad_words_token_ids if len(word) > 1]
        banned = [*params.forbidden_token_ids, *single]
        if params.allowed_token_ids is not None or banned:
            self._mask_row(row, params.allowed_token_ids, banned)
        if several:
            self._take_words(row, several, added.token_ids[added.num_prompt_tokens :])
        return row in self._masked or row in self._words

    def _mask_row(self, row: int, allowed: object, banned: list[int]) -> None:
        if self._mask is None:
            shape = (self._num_rows, self._vocab_size)
            self._mask = torch.zeros(shape, dtype=torch.bool, device=self._device)
        mask = self._mask[row].fill_(allowed is not None)
        if allowed is not None:
            mask.index_fill_(0, to_device(allowed, torch.int64, self._device), False)
        if banned:
            mask.index_fill_(0, to_device(banned, torch.int64, self._device), True)
        self._masked.add(row)

    def _take_words(self, row: int, words: list[tuple[int, ...]], generated: list[int]) -> None:
        if self._recent is None:
            shape = (self._num_rows, WIDTH)
            self._recent = torch.full(shape, NO_TOKEN, dtype=torch.int32, device=self._device)
        known = generated[-WIDTH:]
        padded = [NO_TOKEN] * (WIDTH - len(known)) + known
        self._recent[row] = to_device(padded, torch.int32, self._device)
        before = [[ANY_TOKEN] * (WIDTH + 1 - len(word)) + list(word[:-1]) for word in words]
        self._words[row] = _Words(
            before=to_device(before, torch.int32, self._device),
            last=to_device([word[-1] for word in words], torch.int64, self._device),
            width=max(map(len, words)) - 1,
        )

    def plan(self, asking: list[tuple[int, int]]) -> BanPlan | None:
        """Return what these (place, row) pairs ask for, None where none does."""
        masked = [pair for pair in asking if pair[1] in self._masked]
        worded = [pair for pair in asking if pair[1] in self._words]
        if not masked and not worded:
            return None
        places, rows = self._columns(masked)
        plan = BanPlan(masked_places=places, masked_rows=rows)
        if worded:
            own = [self._words[row] for _, row in worded]
            counts = to_device([len(words.last) for words in own], torch.int64, self._device)
            total = sum(len(words.last) for words in own)
            plan.places, plan.rows = self._columns(worded)
            plan.word_places, plan.word_rows = (
                column.repeat_interleave(counts, output_size=total)
                for column in (plan.places, plan.rows)
            )
            plan.words = _Words(
                before=torch.cat([words.before for words in own]),
                last=torch.cat([words.last for words in own]),
                width=max(words.width for words in own),
            )
        return plan

    def _columns(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        columns = [[place for place, _ in pairs], [row for _, row in pairs]]
        places, rows = to_device(columns, torch.int64, self._device)
        return places, rows

    def apply(self, logits: Tensor, plan: BanPlan) -> None:
        """Ban tokens in logits [num_rows, vocab_size], in place."""
        if self._mask is not None and len(plan.masked_places):
            own = logits.index_select(0, plan.masked_places)
            own.masked_fill_(self._mask.index_select(0, plan.masked_rows), LOWEST)
            logits.index_copy_(0, plan.masked_places, own)
        words = plan.words
        if words is None or plan.word_rows is None or plan.word_places is None:
            return
        assert self._recent is not None, "a row with words has its tokens"
        said = self._recent[:, -words.width :].index_select(0, plan.word_rows)
        before = words.before[:, -words.width :]
        follows = ((said == before) | (before == ANY_TOKEN)).all(dim=1)
        # Several words may end in one token: what is added twice to -inf leaves it.
        ban = torch.where(follows, LOWEST, 0.0).to(logits.dtype)
        logits.index_put_((plan.word_places, words.last), ban, accumulate=True)

    def note(self, token_ids: Tensor, plan: BanPlan) -> None:
        """Remember the sampled tokens, [rows of the step], of rows with words."""
        if plan.rows is None or plan.places is None or self._recent is None:
            return
        new = token_ids.index_select(0, plan.places).int().unsqueeze(1)
        kept = self._recent.index_select(0, plan.rows)[:, 1:]
        self._recent.index_copy_(0, plan.rows, torch.cat([kept, new], dim=1))
