"""Tool-call parser `llama3_json`: bare JSON objects."""

from quire import hookimpl
from quire.interfaces.plugin import ToolCallParserPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_tool_call_parsers() -> list[ToolCallParserPlugin]:
    """Offer `llama3_json`."""
    return [
        ToolCallParserPlugin(
            name="llama3_json",
            load="quire_parsers.llama3_json.parser:Llama3JsonParser",
            summary="bare JSON objects with parameters, Llama 3.1 to 3.3",
        ),
    ]
