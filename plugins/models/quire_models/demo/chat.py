"""Render conversations as text with the demo's chat template, and cut the text into turns."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire_models.demo.data import Conversation

TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text().strip()
END_OF_TURN = "<|im_end|>\n"


def _to_json(value: Any) -> str:
    """Write JSON as Transformers' own `tojson` does: no HTML escapes, keys in the given order."""
    return json.dumps(value, ensure_ascii=False)


@cache
def _compiled_template() -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    return environment.from_string(TEMPLATE)


def render(conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    """Render the whole conversation."""
    return _compiled_template().render(
        messages=conversation.messages,
        tools=conversation.tools or None,
        add_generation_prompt=add_generation_prompt,
    )


def render_turns(conversation: Conversation) -> list[str]:
    """Render the conversation and cut it after each turn; joined, the turns are the rendered text.

    Every turn begins and ends with a special token, so encoding turn by turn gives the ids of the
    text.
    """
    *turns, rest = render(conversation).split(END_OF_TURN)
    if rest:
        raise ValueError(
            f"the rendered conversation ends with {rest!r}; the template must end every turn."
        )
    return [turn + END_OF_TURN for turn in turns]
