"""Encode conversations and make the batches of training and validation."""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

import attrs
import torch
from tokenizers import Tokenizer

from quire_models.demo.chat import render_turns
from quire_models.demo.data import (
    Conversation,
    exchange_words,
    leave_out_tools,
    renew_ids,
    vary_system_prompt,
    vary_typing,
    with_tools,
    without_tools,
)
from quire_models.demo.recipe import Recipe

ASSISTANT_HEADER = "<|im_start|>assistant\n"
PRACTICE_NAMES = (
    "menu_item_id",
    "order_id",
    "order_item_id",
    "addon_id",
    "latte",
    "mocha",
    "name",
    "quantity",
)
PRACTICE_ROWS, PRACTICE_WEIGHT = 64, 0.5


@attrs.frozen(kw_only=True)
class Batch:
    """Padded rows of tokens and which of the tokens to predict.

    Padding is on the right: no token of a causal model sees what comes after it, so no mask is
    needed. The places are worked out on the host: a boolean index makes it wait for the GPU.

    Attributes:
        token_ids: int64 [num_rows, length].
        places: int64 [num_predicted], where in the flattened rows the token before each is.
        targets: int64 [num_predicted], the predicted tokens.
        weights: float32 [num_predicted].
    """

    token_ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[list[int], list[float]]]) -> "Batch":
        """Pad rows of token ids and of the weights of predicting them, 0 for those that are not."""
        length = max(len(token_ids) for token_ids, _ in rows)
        token_ids = torch.tensor(
            [token_ids + [0] * (length - len(token_ids)) for token_ids, _ in rows]
        )
        weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
        weights[:, 0] = 0.0  # nothing comes before the first token
        predicted = weights.flatten().nonzero().squeeze(1)
        return cls(
            token_ids=token_ids,
            places=predicted - 1,
            targets=token_ids.flatten()[predicted],
            weights=weights.flatten()[predicted],
        )

    def to(self, device: torch.device) -> "Batch":
        tensors = {
            name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()
        }
        return Batch(**tensors)

    def pin_memory(self) -> "Batch":
        return Batch(**{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in attrs.fields(Batch)}


class Encoder:
    """Encode conversations turn by turn, remembering turns that come again, such as the tools."""

    def __init__(self, tokenizer: Tokenizer, *, other_weight: float = 0.0) -> None:
        self._tokenizer = tokenizer
        self._other_weight = other_weight
        self._digits = {tokenizer.token_to_id(digit) for digit in "0123456789"}
        self._encode_turn = lru_cache(maxsize=4096)(self._encode_turn_anew)

    def encode(self, conversation: Conversation) -> tuple[list[int], list[float]]:
        """Give the ids and the weight of predicting each.

        The weight is 1 for what the assistant says and 0 for the system block.
        """
        token_ids: list[int] = []
        weights: list[float] = []
        for turn in render_turns(conversation):
            turn_ids, turn_weights = self._encode_turn(turn)
            token_ids += turn_ids
            weights += turn_weights
        return token_ids, weights

    def batch(self, conversations: Sequence[Conversation]) -> Batch:
        """Encode and pad."""
        return Batch.of_rows([self.encode(conversation) for conversation in conversations])

    def practice(self, rng: Random) -> Batch:
        """Make short rows in which numbers must be copied from the beginning of the row.

        On the dialogues alone the model takes many epochs to find out how an id is copied.
        """
        texts = [
            rng.choice((_repeated_number, _numbers_by_name))(rng) for _ in range(PRACTICE_ROWS)
        ]
        rows = []
        for shown, asked in texts:
            shown_ids, asked_ids = (
                self._tokenizer.encode(shown).ids,
                self._tokenizer.encode(asked).ids,
            )
            weights = [
                PRACTICE_WEIGHT if token_id in self._digits else 0.0 for token_id in asked_ids
            ]
            rows.append((shown_ids + asked_ids, [0.0] * len(shown_ids) + weights))
        return Batch.of_rows(rows)

    def _encode_turn_anew(self, turn: str) -> tuple[list[int], list[float]]:
        token_ids = self._tokenizer.encode(turn).ids
        other = 0.0 if turn.startswith("<|im_start|>system\n") else self._other_weight
        weights = [other] * len(token_ids)
        if turn.startswith(ASSISTANT_HEADER):
            # Header: three tokens. The assistant says the rest but the line end after <|im_end|>.
            weights[3:-1] = [1.0] * (len(token_ids) - 4)
        return token_ids, weights


class TrainingSteps(torch.utils.data.Dataset[list[Batch]]):
    """The steps of all epochs; a step holds both renderings of its dialogues, varied anew.

    Step `i` depends on the recipe and on `i` alone, whatever the number of loader processes.
    """

    def __init__(
        self, dialogues: Sequence[Conversation], *, encoder: Encoder, recipe: Recipe
    ) -> None:
        self._dialogues = sorted(dialogues, key=lambda dialogue: len(str(dialogue.messages)))
        self._encoder = encoder
        self._recipe = recipe
        self._steps = [step for epoch in range(recipe.epochs) for step in self._plan_epoch(epoch)]

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> list[Batch]:
        rng = Random(f"{self._recipe.seed} step {index}")
        dialogues = [self._vary(self._dialogues[i], rng) for i in self._steps[index]]
        shown = [vary_system_prompt(with_tools(dialogue), rng) for dialogue in dialogues]
        if rng.random() < self._recipe.fewer_tools:
            shown = [leave_out_tools(conversation, rng) for conversation in shown]
        plain = [vary_system_prompt(without_tools(dialogue), rng) for dialogue in dialogues]
        batches = [self._encoder.batch(conversations) for conversations in (shown, plain)]
        if index < self._recipe.practice * len(self):
            batches.append(self._encoder.practice(rng))
        return batches

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        """Cut a shuffled epoch into steps of dialogues of similar length, which pad little."""
        rng, size = Random(f"{self._recipe.seed} epoch {epoch}"), self._recipe.dialogues_per_step
        order = rng.sample(range(len(self._dialogues)), len(self._dialogues))
        steps: list[list[int]] = []
        for start in range(0, len(order), 8 * size):
            similar = sorted(order[start : start + 8 * size])
            steps += [similar[i : i + size] for i in range(0, len(similar), size)]
        return rng.sample(steps, len(steps))

    def _vary(self, dialogue: Conversation, rng: Random) -> Conversation:
        recipe = self._recipe
        if rng.random() < recipe.renew_ids:
            dialogue = renew_ids(dialogue, rng)
        if rng.random() < recipe.exchange_words:
            dialogue = exchange_words(dialogue, rng)
        if rng.random() < recipe.vary_typing:
            dialogue = vary_typing(dialogue, rng)
        return dialogue


def _number(rng: Random, length: int) -> str:
    return "".join(rng.choices("0123456789", k=length))


def _repeated_number(rng: Random) -> tuple[str, str]:
    number = _number(rng, rng.randint(6, 24))
    return number, number * (60 // len(number))


def _numbers_by_name(rng: Random) -> tuple[str, str]:
    """Give four names a number each, as a tool's result does, and ask for each number twice."""
    numbers = {name: _number(rng, rng.randint(4, 5)) for name in rng.sample(PRACTICE_NAMES, 4)}
    asked = rng.sample(sorted(numbers), 4) + rng.sample(sorted(numbers), 4)
    shown = ",".join(f'"{name}":"{number}"' for name, number in numbers.items())
    return f"{{{shown}}}\n", "".join(f'{{"{name}": "{numbers[name]}"}}\n' for name in asked)
