"""Measure a checkpoint on the validation dialogues.

    python -m quire_models.demo.evaluate --data FOLDER --model FOLDER [--draft FOLDER]

Losses are of the assistant's tokens. Answers are generated greedily after the true context and
compared with the true ones.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from quire_models.demo.batches import Batch
from quire_models.demo.chat import render
from quire_models.demo.data import TOOLS, Conversation, Message, read_dialogues
from quire_models.demo.network import (
    END_OF_TEXT_ID,
    TURN_END_ID,
    assistant_loss,
    load_checkpoint,
    predict,
)
from quire_models.demo.train import validation_batches

TOOL_CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>", re.DOTALL)
ID_NAMES = ("menu_item_id", "order_id", "order_item_id", "addon_id")
MAX_CALL_TOKENS = 160


@attrs.frozen(kw_only=True)
class AssistantTurn:
    """One assistant message of a dialogue and the text that leads up to it."""

    context: str
    message: Message


@attrs.define
class Tally:
    """Count how often something held."""

    held: int = 0
    total: int = 0

    def add(self, holds: bool) -> None:
        self.held += holds
        self.total += 1

    def __str__(self) -> str:
        return f"{self.held}/{self.total} = {self.held / max(1, self.total):.1%}"


def assistant_turns(dialogues: list[Conversation]) -> list[AssistantTurn]:
    """Give every assistant message with its context, all tools shown."""
    return [
        AssistantTurn(
            context=render(
                Conversation(messages=dialogue.messages[:index], tools=TOOLS),
                add_generation_prompt=True,
            ),
            message=message,
        )
        for dialogue in dialogues
        for index, message in enumerate(dialogue.messages)
        if message["role"] == "assistant"
    ]


@torch.no_grad()
def generate(model: Any, tokenizer: Tokenizer, contexts: list[str]) -> list[str]:
    """Continue each context greedily to the end of the turn, 128 contexts at a time."""
    answers: list[str] = []
    for start in range(0, len(contexts), 128):
        rows = [encoding.ids for encoding in tokenizer.encode_batch(contexts[start : start + 128])]
        length = max(map(len, rows))
        padded = torch.tensor(
            [[END_OF_TEXT_ID] * (length - len(row)) + row for row in rows], device=model.device
        )
        present = torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device
        )
        output = model.generate(
            padded,
            attention_mask=present,
            do_sample=False,
            max_new_tokens=MAX_CALL_TOKENS,
            eos_token_id=TURN_END_ID,
        )
        answers += tokenizer.decode_batch(output[:, length:].tolist())
    return answers


def parse_call(answer: str) -> tuple[str, Any] | None:
    """Read the name and arguments of the first tool call; None without one in valid JSON."""
    found = TOOL_CALL.search(answer)
    try:
        call = json.loads(found[1]) if found else None
        return (call["name"], call["arguments"]) if call else None
    except (ValueError, KeyError):
        return None


def score_turns(turns: list[AssistantTurn], answers: list[str]) -> dict[str, Tally]:
    """Compare the answers with the true messages; arguments only where the name is right."""
    names = (
        "text where text is due",
        "call where a call is due",
        "name",
        "arguments",
        "arguments but for case",
        "ids",
    )
    tallies = {name: Tally() for name in names}
    for turn, answer in zip(turns, answers, strict=True):
        call = parse_call(answer)
        if "tool_calls" not in turn.message:
            tallies["text where text is due"].add("<tool_call>" not in answer)
            continue
        function = turn.message["tool_calls"][0]["function"]
        tallies["call where a call is due"].add(call is not None)
        tallies["name"].add(call is not None and call[0] == function["name"])
        if call is None or call[0] != function["name"]:
            continue
        true_arguments = json.loads(function["arguments"])
        tallies["arguments"].add(call[1] == true_arguments)
        tallies["arguments but for case"].add(_normalized(call[1]) == _normalized(true_arguments))
        given = list(_ids(call[1]))
        for id_value in _ids(true_arguments):
            if f'"{id_value[1]}"' in turn.context:
                tallies["ids"].add(id_value in given)
        tally = tallies.setdefault(f"arguments of {function['name']}", Tally())
        tally.add(_normalized(call[1]) == _normalized(true_arguments))
    return tallies


@torch.no_grad()
def agreement(model: Qwen3ForCausalLM, draft: Qwen3ForCausalLM, batches: list[Batch]) -> float:
    """Give the share of the assistant's tokens that both would choose greedily."""
    tally = Tally()
    for batch in batches:
        same = predict(model, batch).argmax(-1) == predict(draft, batch).argmax(-1)
        tally.held += int(same.sum())
        tally.total += len(same)
    return tally.held / tally.total


def _normalized(arguments: Any) -> str:
    """Fold case and drop white space before a quote, in which the data is not consistent."""
    return re.sub(r'\s+"', '"', json.dumps(arguments, sort_keys=True).lower())


def _ids(arguments: Any) -> Iterator[tuple[str, str]]:
    if isinstance(arguments, list):
        for item in arguments:
            yield from _ids(item)
    elif isinstance(arguments, dict):
        for name, value in arguments.items():
            if name in ID_NAMES:
                yield name, value
            else:
                yield from _ids(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint of the demo.")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--draft", type=Path, help="folder of a draft to compare with the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    dialogues = read_dialogues(arguments.data / "valid.jsonl")
    validation = validation_batches(dialogues, tokenizer=tokenizer, device=device)
    model = load_checkpoint(arguments.model, device)
    draft = load_checkpoint(arguments.draft, device) if arguments.draft else None
    for name, batches in validation.items():
        loss = assistant_loss(model, batches)
        print(f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}", flush=True)
        if draft is not None:
            loss, share = assistant_loss(draft, batches), agreement(model, draft, batches)
            print(f"{name}: loss of the draft {loss:.4f}, agreement {share:.3f}", flush=True)
    turns = assistant_turns(dialogues)
    answers = generate(model, tokenizer, [turn.context for turn in turns])
    for name, tally in score_turns(turns, answers).items():
        print(f"{name}: {tally}")


if __name__ == "__main__":
    main()
