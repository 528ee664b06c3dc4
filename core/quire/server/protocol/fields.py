"""Types of fields with their bounds. A description says what is allowed: errors quote it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from quire.errors import RequestError
from quire.request_checks import MAX_BAD_WORD_CHARS, MAX_BAD_WORDS, MAX_TOKEN_IDS

MAX_TOKENS = 2**24
MAX_TOKEN_ID = 2**31 - 1
MAX_TOKEN_COUNT = 2**24
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_N = 128
MAX_PROMPTS = 128
MAX_CHOICES = 1024
MAX_MESSAGES = 16384
MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 2**18
MAX_PROCESSORS = 64
MAX_NAME_CHARS = 128
MAX_TEMPLATE_VALUES = 2**16
INT64_MAX = 2**63 - 1
INT64_MIN = -(2**63)

REFUSED = "refused"

# Null, that is absence, is all that such a field may hold.
Refused = Annotated[None, Meta(description="not supported yet", extra={REFUSED: True})]

Name = Annotated[str, Meta(min_length=1, description="a text that is not empty")]
Flag = Annotated[bool, Meta(description="true or false")]
Ignored = Annotated[str, Meta(description="a text; it changes nothing")]
Metadata = Annotated[dict[str, str], Meta(description="texts by name; they change nothing")]

TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID, description="token ids from 0")]
TokenIds = Annotated[
    list[TokenId], Meta(max_length=MAX_TOKEN_COUNT, description="token ids from 0")
]
Prompt = Annotated[
    Annotated[str, Meta(min_length=1)]
    | Annotated[
        list[
            Annotated[str, Meta(min_length=1)]
            | TokenId
            | Annotated[list[TokenId], Meta(min_length=1)]
        ],
        Meta(min_length=1),
    ],
    Meta(description="a text, texts, token ids from 0, or lists of them; none empty"),
]
Stop = Annotated[
    Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
    | Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]],
        Meta(max_length=MAX_STOP_STRINGS),
    ],
    Meta(description=f"up to {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_CHARS} characters"),
]
StopTokenIds = Annotated[
    list[TokenId],
    Meta(max_length=MAX_STOP_TOKEN_IDS, description=f"up to {MAX_STOP_TOKEN_IDS} token ids from 0"),
]
AllowedTokenIds = Annotated[
    list[TokenId],
    Meta(
        min_length=1,
        max_length=MAX_TOKEN_IDS,
        description=f"1 to {MAX_TOKEN_IDS} token ids from 0; left out, all are",
    ),
]
ForbiddenTokenIds = Annotated[
    list[TokenId],
    Meta(max_length=MAX_TOKEN_IDS, description=f"up to {MAX_TOKEN_IDS} token ids from 0"),
]
BadWords = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]],
    Meta(
        max_length=MAX_BAD_WORDS,
        description=f"up to {MAX_BAD_WORDS} texts of 1 to {MAX_BAD_WORD_CHARS} characters",
    ),
]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(description="token ids, each with a number from -100 to 100"),
]


Count = Annotated[
    int, Meta(ge=1, le=MAX_TOKENS, description=f"whole numbers from 1 to {MAX_TOKENS}")
]
CountOrZero = Annotated[
    int, Meta(ge=0, le=MAX_TOKENS, description=f"whole numbers from 0 to {MAX_TOKENS}")
]
PromptLength = Annotated[
    int,
    Meta(
        ge=-1,
        le=MAX_TOKENS,
        description=f"whole numbers from 1 to {MAX_TOKENS}; -1 for the model's length",
    ),
]
Choices = Annotated[int, Meta(ge=1, le=MAX_N, description=f"whole numbers from 1 to {MAX_N}")]
NumLogprobs = Annotated[
    int, Meta(ge=0, le=MAX_LOGPROBS, description=f"whole numbers from 0 to {MAX_LOGPROBS}")
]
Integer64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX, description="64-bit whole numbers")]
Temperature = Annotated[float, Meta(ge=0, le=2, description="numbers from 0 (greedy) to 2")]
TopP = Annotated[float, Meta(gt=0, le=1, description="numbers above 0 up to 1")]
MinP = Annotated[float, Meta(ge=0, le=1, description="numbers from 0 to 1")]
TopK = Annotated[
    int,
    Meta(ge=-1, le=INT64_MAX, description="64-bit whole numbers from 1; 0 or -1 turns it off"),
]
Penalty = Annotated[float, Meta(ge=-2, le=2, description="numbers from -2 to 2")]
RepetitionPenalty = Annotated[
    float, Meta(ge=0.001, le=1000, description="numbers from 0.001 to 1000")
]
LengthPenalty = Annotated[float, Meta(ge=-10, le=10, description="numbers from -10 to 10")]
EarlyStopping = Annotated[
    bool | Literal["never"], Meta(description='true, false or "never"; of beam searches')
]
ExtraArguments = Annotated[
    dict[str, Any],
    Meta(max_length=MAX_PROCESSORS, description="arguments by the name of a logits processor"),
]
CacheSalt = Annotated[
    str, Meta(min_length=1, max_length=128, description="a text of 1 to 128 characters")
]
RequestId = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=128,
        pattern="^[ -~]+$",
        description="1 to 128 printable ASCII characters",
    ),
]
FunctionName = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_NAME_CHARS,
        pattern="^[A-Za-z0-9_.-]+$",
        description=f"1 to {MAX_NAME_CHARS} letters, digits and _ . -",
    ),
]


def conflict(name: str, fact: str) -> RequestError:
    """Return the error for a field that does not fit to another."""
    return RequestError(f"{name} {fact}.", parameter=name)
