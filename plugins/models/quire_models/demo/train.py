"""Train the demo's tokenizer, model and draft.

    python -m quire_models.demo.train --data FOLDER --output FOLDER [--only model|draft]

Writes OUTPUT/model, then distils it into OUTPUT/draft.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from quire_models.demo.batches import Batch, Encoder, TrainingSteps
from quire_models.demo.chat import render
from quire_models.demo.data import (
    Conversation,
    read_dialogues,
    renderings,
    with_tools,
    without_tools,
)
from quire_models.demo.network import (
    add_dropout,
    assistant_loss,
    build_draft,
    build_model,
    load_checkpoint,
    predict,
    save_checkpoint,
)
from quire_models.demo.recipe import CONTEXT_LENGTH, DRAFT, MODEL, VOCABULARY_SIZE, Recipe
from quire_models.demo.tokenizer import save_tokenizer, train_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Trainer:
    """One training run: the optimizer, the averaged weights, and the best ones so far."""

    def __init__(self, model: Qwen3ForCausalLM, *, recipe: Recipe, num_steps: int) -> None:
        self.model, self.recipe, self.num_steps = model, recipe, num_steps
        self.device = model.device
        add_dropout(model, recipe.dropout)
        self.averaged = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema_decay)
        )
        if self.device.type == "cuda":
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        norms = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, self._learning_rate_factor
        )
        self.best_loss = math.inf
        self.num_epochs_without_progress = 0
        self.best_weights: dict[str, torch.Tensor] = {}

    def take_step(self, batches: list[Batch], teacher: Qwen3ForCausalLM | None) -> torch.Tensor:
        """Update the weights once; the loss is the weighted mean over all the step's batches."""
        self.model.train()
        batches = [batch.to(self.device) for batch in batches]
        total_weight = sum(batch.weights.sum() for batch in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = self._weighted_loss(batch, teacher) / total_weight
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged.update_parameters(self.model)
        return loss

    def validate(self, validation: dict[str, list[Batch]]) -> dict[str, float]:
        """Measure the averaged weights on both renderings; keep them if the mean loss is best."""
        model: Any = self.averaged.module
        with _autocast(self.device):
            losses = {name: assistant_loss(model, batches) for name, batches in validation.items()}
        mean = sum(losses.values()) / len(losses)
        self.num_epochs_without_progress += 1
        if mean < self.best_loss:
            self.num_epochs_without_progress = 0
            self.best_loss = mean
            self.best_weights = {
                name: weight.detach().clone() for name, weight in model.state_dict().items()
            }
        return losses

    def best_model(self) -> Qwen3ForCausalLM:
        """Give the model with the best weights."""
        self.model.load_state_dict(self.best_weights)
        return self.model

    def _weighted_loss(self, batch: Batch, teacher: Qwen3ForCausalLM | None) -> torch.Tensor:
        smoothing = self.recipe.label_smoothing
        with _autocast(self.device):
            logits = predict(self.model, batch)
        losses = F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)
        if teacher is not None:
            with torch.no_grad(), _autocast(self.device):
                taught = predict(teacher, batch).softmax(-1)
            distilled = F.cross_entropy(logits, taught, reduction="none")
            losses = losses.lerp(distilled, self.recipe.distillation)
        return (losses * batch.weights).sum()

    def _learning_rate_factor(self, step: int) -> float:
        """Rise linearly over the warm-up, then fall along a cosine to a fiftieth."""
        warmup = max(1, int(self.recipe.warmup * self.num_steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    model: Qwen3ForCausalLM,
    *,
    recipe: Recipe,
    tokenizer: Tokenizer,
    data: Path,
    teacher: Qwen3ForCausalLM | None = None,
) -> Qwen3ForCausalLM:
    """Train the model and give it with the weights of the epoch of the best validation loss."""
    device = model.device
    steps = TrainingSteps(
        read_dialogues(data / "train.jsonl"),
        encoder=Encoder(tokenizer, other_weight=recipe.other_weight),
        recipe=recipe,
    )
    validation = validation_batches(
        read_dialogues(data / "valid.jsonl"), tokenizer=tokenizer, device=device
    )
    trainer = Trainer(model, recipe=recipe, num_steps=len(steps))
    loader = torch.utils.data.DataLoader(
        steps, batch_size=None, num_workers=4, prefetch_factor=8, pin_memory=device.type == "cuda"
    )
    started, steps_per_epoch = time.monotonic(), len(steps) // recipe.epochs
    loss = torch.zeros((), device=device)
    for step, batches in enumerate(loader, start=1):
        loss += trainer.take_step(batches, teacher) / steps_per_epoch
        if step % steps_per_epoch:
            continue
        losses = trainer.validate(validation)
        report = {"epoch": step // steps_per_epoch, "train": loss.item(), **losses}
        print(json.dumps(report | {"seconds": time.monotonic() - started}), flush=True)
        loss.zero_()
        if trainer.num_epochs_without_progress > recipe.patience:
            break
    return trainer.best_model()


def validation_batches(
    dialogues: list[Conversation], *, tokenizer: Tokenizer, device: torch.device
) -> dict[str, list[Batch]]:
    """Encode both renderings of the dialogues as they are, 16 conversations a batch."""
    encoder, batches = Encoder(tokenizer), {}
    for render_dialogue in (with_tools, without_tools):
        conversations = [render_dialogue(dialogue) for dialogue in dialogues]
        conversations = [conversation for conversation in conversations if conversation.messages]
        batches[render_dialogue.__name__] = [
            encoder.batch(conversations[start : start + 16]).to(device)
            for start in range(0, len(conversations), 16)
        ]
    return batches


def make_model(data: Path, output: Path, *, recipe: Recipe, device: torch.device) -> None:
    """Train the tokenizer and the model into OUTPUT/model."""
    texts = (
        render(conversation) for conversation in renderings(read_dialogues(data / "train.jsonl"))
    )
    tokenizer = train_tokenizer(texts, vocabulary_size=VOCABULARY_SIZE)
    save_tokenizer(tokenizer, output / "model", context_length=CONTEXT_LENGTH)
    model = train(build_model(recipe, device), recipe=recipe, tokenizer=tokenizer, data=data)
    save_checkpoint(model, output / "model")


def make_draft(data: Path, output: Path, *, recipe: Recipe, device: torch.device) -> None:
    """Distil OUTPUT/model into OUTPUT/draft, which carries the same tokenizer files."""
    tokenizer = Tokenizer.from_file(str(output / "model" / "tokenizer.json"))
    teacher = load_checkpoint(output / "model", device)
    draft = build_draft(recipe, teacher)
    draft = train(draft, recipe=recipe, tokenizer=tokenizer, data=data, teacher=teacher)
    save_checkpoint(draft, output / "draft")
    for name in TOKENIZER_FILES:
        shutil.copyfile(output / "model" / name, output / "draft" / name)


MAKERS = {"model": (make_model, MODEL), "draft": (make_draft, DRAFT)}


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and its draft.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.jsonl and valid.jsonl"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write model/ and draft/ into"
    )
    parser.add_argument(
        "--only", choices=MAKERS, help="one of the two; the draft needs the model in OUTPUT"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipes"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for name in (arguments.only,) if arguments.only else MAKERS:
        make, recipe = MAKERS[name]
        recipe = recipe.override(arguments.set)
        print(recipe, flush=True)
        make(arguments.data, arguments.output, recipe=recipe, device=device)


if __name__ == "__main__":
    main()
