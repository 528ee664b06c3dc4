"""Run as a process of its own: many `quire` commands, one after another, without torch.

Reads a JSON list of argument lists; prints exit code, output and seconds of each, and whether
torch was imported when it had ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from typing import Any

from quire.cli.main import main


def run(arguments: list[str]) -> dict[str, Any]:
    """Run one command."""
    out, err = io.StringIO(), io.StringIO()
    begin = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "seconds": time.monotonic() - begin,
        "torch": "torch" in sys.modules,
    }


if __name__ == "__main__":
    results = [run(arguments) for arguments in json.load(sys.stdin)]
    print(json.dumps(results))
