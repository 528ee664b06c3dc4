"""Tool-call parser `mistral`: what stands after `[TOOL_CALLS]`."""

from quire import hookimpl
from quire.interfaces.plugin import ToolCallParserPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_tool_call_parsers() -> list[ToolCallParserPlugin]:
    """Offer `mistral`."""
    return [
        ToolCallParserPlugin(
            name="mistral",
            load="quire_parsers.mistral.parser:MistralParser",
            summary="JSON after [TOOL_CALLS], a list or name and arguments",
        ),
    ]
