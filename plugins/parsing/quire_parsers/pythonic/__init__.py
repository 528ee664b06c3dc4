"""Tool-call parser `pythonic`: a list of calls as Python writes it."""

from quire import hookimpl
from quire.interfaces.plugin import ToolCallParserPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_tool_call_parsers() -> list[ToolCallParserPlugin]:
    """Offer `pythonic`."""
    return [
        ToolCallParserPlugin(
            name="pythonic",
            load="quire_parsers.pythonic.parser:PythonicParser",
            summary="a Python list of calls, Llama 3.2 and 4",
        ),
    ]
