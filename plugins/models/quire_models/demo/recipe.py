"""The shapes of the two models and how they are trained."""

from typing import Any

import attrs

VOCABULARY_SIZE = 4096
CONTEXT_LENGTH = 2048


@attrs.frozen(kw_only=True)
class Recipe:
    """All that decides a training run; a chance is per dialogue and epoch, or as it says."""

    # Shape; the head dimension is 64 and there are two KV heads.
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    intermediate_size: int = 896

    epochs: int = 14
    patience: int = 2  # epochs without a better validation loss before training stops
    dialogues_per_step: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05  # share of the steps
    dropout: float = 0.15
    label_smoothing: float = 0.0
    ema_decay: float = 0.995
    other_weight: float = 0.1  # weight of predicting what the assistant does not say
    distillation: float = 0.0  # share of the teacher's distribution in the loss

    renew_ids: float = 1.0
    exchange_words: float = 0.5
    vary_typing: float = 1.0
    fewer_tools: float = 0.5  # share of the steps that leave out tools
    practice: float = 0.3  # share of the steps, the first ones, with a batch that practises copying
    seed: int = 1

    def override(self, settings: list[str]) -> "Recipe":
        """Apply `NAME=VALUE` settings.

        Raises: ValueError for a name that is no field.
        """
        fields = attrs.fields_dict(Recipe)
        changes = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in fields:
                raise ValueError(f"unknown setting {name!r}; there are: {', '.join(fields)}.")
            kind: Any = type(fields[name].default)
            changes[name] = kind(value)
        return attrs.evolve(self, **changes)


MODEL = Recipe()
DRAFT = Recipe(
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    intermediate_size=512,
    dropout=0.0,
    weight_decay=0.05,
    learning_rate=4e-3,
    distillation=0.9,
    epochs=8,
    practice=0.15,
)
