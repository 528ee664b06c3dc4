"""The exceptions that Quire raises on purpose.

    QuireError
    ├── ConfigError (ValueError)       an option, a folder or a config.json that cannot be used
    │   └── CheckpointError            a file of weights that is missing, damaged or does not match
    ├── RequestError (ValueError)      one request that cannot be served; the engine goes on
    ├── PluginError                    a plugin that cannot be loaded or breaks its contract
    ├── KernelError                    a kernel that cannot run here or gave a wrong result
    │   └── BuildError                 native code that could not be compiled
    ├── OverloadedError                nothing more can be taken on now; the same may work later
    ├── OutOfBlocks                    no free KV block; the caller's state is unchanged
    └── EngineDeadError                the engine stopped; every waiting request ends with it

Each message says what was given, what is allowed and what to do, in one line.
"""


def shown(value: object, limit: int = 60) -> str:
    """Return a value's `repr` for a message, cut to `limit` characters."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  of a whole number of more than 4,300 digits, for one
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class QuireError(Exception):
    """Root of the tree. `exit_code` is what a command ends with."""

    exit_code = 1


class ConfigError(QuireError, ValueError):
    """Report an option, folder or config.json that cannot be used."""

    exit_code = 2


class CheckpointError(ConfigError):
    """Report a file of weights that is missing, damaged or does not match the model."""


# How the error of a sequence begins that its own request is to blame for.
CONTRADICTION = "the request contradicts itself: "


class RequestError(QuireError, ValueError):
    """Refuse one request; the engine and all other requests go on.

    `parameter` names the field that is wrong, or None where no single one is.
    """

    exit_code = 2

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class PluginError(QuireError):
    """Report a plugin that cannot be loaded or breaks its contract."""

    exit_code = 2


class KernelError(QuireError):
    """Report a kernel that cannot run on this machine or gave a wrong result."""


class BuildError(KernelError):
    """Report native code that could not be compiled, with the compiler's own first error."""


class OverloadedError(QuireError):
    """Report that nothing more can be taken on now: a queue is full, a start or an end goes on.

    `code` is a word for programs, `retry_after_s` when asking again makes sense.
    """

    def __init__(self, message: str, *, code: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class OutOfBlocks(QuireError):
    """Report that too few KV blocks are free; the caller's state is unchanged."""


class EngineDeadError(QuireError):
    """Report that the engine stopped; `__cause__` holds the reason."""
