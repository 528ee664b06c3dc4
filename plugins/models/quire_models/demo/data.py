"""Read the dialogues and vary them: two renderings, fresh ids, other drinks, other prompts.

It works on messages in the OpenAI form; `chat.py` makes text of them and `batches.py` tokens.
"""

import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import attrs

Message = dict[str, Any]
Tool = dict[str, Any]

TOOLS: list[Tool] = json.loads(Path(__file__).with_name("tools.json").read_text())

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You take orders at a coffee shop.",
    "You are the barista of a small coffee shop. Be brief and friendly.",
    "Help the customer order a drink.",
    "You work at a coffee shop. Use the tools to look up the menu and to place the order.",
)

# Words of one group can change places in a dialogue and leave it sensible: "a latte with oat milk"
# becomes "a mocha with almond milk" in what the customer says and in every call and result.
EXCHANGEABLE = (
    ("latte", "mocha", "cortado", "cappuccino", "macchiato"),
    ("oat", "almond"),
    ("hazelnut", "vanilla"),
    ("caramel", "chocolate"),
)
# Statements of fact about the menu and names made of two drinks do not survive an exchange.
FIXED_FACTS = re.compile(
    r"what|which|kind|(?<!_)menu(?!_)|fields|chai|matcha|hot choc|sugar free", re.IGNORECASE
)
ID_VALUE = re.compile(r'"(?:menu_item_id|order_id|order_item_id|addon_id)": *"([^"]*\d)\s*"')


@attrs.frozen(kw_only=True)
class Conversation:
    """What one rendering shows: the messages and the tools in the system block."""

    messages: list[Message]
    tools: list[Tool] = attrs.field(factory=list)


def read_dialogues(path: Path) -> list[Conversation]:
    """Read one JSON object a line; `tools` stays empty, as in the file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Conversation(messages=record["messages"]) for record in records]


def with_tools(dialogue: Conversation) -> Conversation:
    """Show all tools, calls and results as they are."""
    return attrs.evolve(dialogue, tools=TOOLS)


def without_tools(dialogue: Conversation) -> Conversation:
    """Drop calls and results, join consecutive texts, and end with the assistant's last text."""
    texts: list[Message] = []
    for message in dialogue.messages:
        if message["role"] == "tool" or not message.get("content"):
            continue
        if texts and texts[-1]["role"] == message["role"]:
            joined = f"{texts[-1]['content']} {message['content']}"
            texts[-1] = {"role": message["role"], "content": joined}
        else:
            texts.append({"role": message["role"], "content": message["content"]})
    while texts and texts[-1]["role"] != "assistant":
        texts.pop()
    return attrs.evolve(dialogue, messages=texts, tools=[])


def renderings(dialogues: list[Conversation]) -> list[Conversation]:
    """Give both renderings of every dialogue, without those in which the assistant says nothing."""
    both = [render(dialogue) for dialogue in dialogues for render in (with_tools, without_tools)]
    return [conversation for conversation in both if conversation.messages]


def renew_ids(conversation: Conversation, rng: Random) -> Conversation:
    """Give the ids in results new digits, the same ones wherever an id appears.

    Such ids can only be copied. Ids that no result shows stay: they are known by heart.
    """
    shown = ID_VALUE.findall("\n".join(_results(conversation)))
    renewed = {old: re.sub(r"\d", lambda _: rng.choice(string.digits), old) for old in shown}
    if not renewed:
        return conversation
    pattern = re.compile("|".join(re.escape(old) for old in sorted(renewed, key=len, reverse=True)))
    return _rewrite(conversation, lambda part: pattern.sub(lambda match: renewed[match[0]], part))


def exchange_words(conversation: Conversation, rng: Random) -> Conversation:
    """Let the words of each group change places throughout, unless facts would turn false."""
    if FIXED_FACTS.search(json.dumps(conversation.messages)):
        return conversation
    exchanged: dict[str, str] = {}
    for group in EXCHANGEABLE:
        exchanged.update(zip(group, rng.sample(group, len(group)), strict=True))
    pattern = re.compile(rf"(?<![a-z])({'|'.join(exchanged)})(?=s?(?![a-z]))", re.IGNORECASE)

    def exchange(match: re.Match[str]) -> str:
        word = exchanged[match[0].lower()]
        return word.capitalize() if match[0][0].isupper() else word

    return _rewrite(conversation, lambda part: pattern.sub(exchange, part))


def vary_system_prompt(conversation: Conversation, rng: Random) -> Conversation:
    """Begin with a system message one time in four."""
    if rng.random() < 0.75:
        return conversation
    prompt = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
    return attrs.evolve(conversation, messages=[prompt, *conversation.messages])


def leave_out_tools(conversation: Conversation, rng: Random) -> Conversation:
    """Keep the tools that are called and one in four of the others, in random order."""
    calls = [call for message in conversation.messages for call in message.get("tool_calls", ())]
    called = {call["function"]["name"] for call in calls}
    tools = [
        tool
        for tool in conversation.tools
        if tool["function"]["name"] in called or rng.random() < 0.25
    ]
    return attrs.evolve(conversation, tools=rng.sample(tools, len(tools)))


def vary_typing(conversation: Conversation, rng: Random) -> Conversation:
    """Sometimes let the customer type without capitals or without the last punctuation mark."""
    lower, bare = rng.random() < 0.15, rng.random() < 0.15

    def retype(message: Message) -> Message:
        if message["role"] != "user":
            return message
        text = message["content"].lower() if lower else message["content"]
        return message | {"content": text.rstrip(".!?") or text if bare else text}

    return attrs.evolve(
        conversation, messages=[retype(message) for message in conversation.messages]
    )


def _results(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "tool"]


def _rewrite(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """Apply `change` to every content and to the arguments of every call."""
    messages = []
    for message in conversation.messages:
        changed = dict(message)
        if message.get("content"):
            changed["content"] = change(message["content"])
        if message.get("tool_calls"):
            changed["tool_calls"] = [
                call
                | {
                    "function": call["function"]
                    | {"arguments": change(call["function"]["arguments"])}
                }
                for call in message["tool_calls"]
            ]
        messages.append(changed)
    return attrs.evolve(conversation, messages=messages)
