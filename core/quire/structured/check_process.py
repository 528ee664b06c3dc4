"""The child that compiles grammars of strangers first: `python -m quire.structured.check_process`.

A JSON line on standard input says how; each later line is a grammar, answered by one line: "" or
what is wrong with it. It is killed where an answer takes too long, and ends with its parent.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from quire.constraints import GrammarKind, GrammarSource
from quire.hooks.registry import load_plugins
from quire.interfaces.grammar import CompiledGrammar, GrammarStuck
from quire.structured.compiler import GrammarCompiler, GrammarSetup

# A walk of random tokens meets what is compiled only when it is reached, as a regex's states. It is
# short where its tokens come as quickly as those of ordinary forms (0.1 ms with 128,000 tokens).
SHORT_WALK_TOKENS, WALK_TOKENS = 8, 64
BRISK_S, WALK_S = 0.004, 0.3
# Of schemas that are first compiled without what makes masks faster: others take long anyway.
SMALL_CHARS = 2**12
ORPHAN_S = 10.0


def main() -> None:
    """Answer until standard input ends."""
    first = json.loads(sys.stdin.readline())
    setup = GrammarSetup(
        backend=first["backend"],
        folder=Path(first["folder"]),
        vocab_size=first["vocab_size"],
        eos_token_ids=tuple(first["eos_token_ids"]),
        is_for_checks=True,
    )
    compiler = GrammarCompiler(setup, load_plugins(first["disabled"]))
    compiler.engine()
    _limit_memory(first["memory_bytes"])
    _say("")
    for line in sys.stdin:
        # Ended by the kernel where its parent, which would kill it earlier, is gone.
        signal.setitimer(signal.ITIMER_REAL, ORPHAN_S)
        answer = _answer(compiler, json.loads(line), setup.vocab_size)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(answer)


def _answer(compiler: GrammarCompiler, asked: dict[str, str], vocab_size: int) -> str:
    try:
        source = GrammarSource(kind=GrammarKind(asked["kind"]), text=asked["text"])
        is_small = source.kind is GrammarKind.JSON_SCHEMA and len(source.text) <= SMALL_CHARS
        if not (is_small and _is_brisk(compiler, source, vocab_size)):
            _walk(compiler.compile(source), vocab_size, WALK_TOKENS)
    except (ValueError, GrammarStuck) as error:
        return str(error) or type(error).__name__
    except MemoryError:
        return "compiling it takes more memory than is allowed"
    except RecursionError:
        return "it is nested too deeply"
    except Exception as error:  # noqa: BLE001  an engine's fault ends no other request
        return f"the grammar engine failed: {type(error).__name__}: {str(error)[:120]}"
    return ""


def _is_brisk(compiler: GrammarCompiler, source: GrammarSource, vocab_size: int) -> bool:
    """Whether a grammar is honoured, and its tokens come quickly with nothing done for them."""
    with contextlib.suppress(Exception):  # which is not the last word
        return _walk(compiler.compile_for_check(source), vocab_size, SHORT_WALK_TOKENS)
    return False


def _walk(grammar: CompiledGrammar, vocab_size: int, most_tokens: int) -> bool:
    """Follow random tokens for a while; whether they came quickly.

    Raises: GrammarStuck where the engine cannot go on.
    """
    draw, matcher = random.Random(0), grammar.start()
    mask = np.zeros((vocab_size + 31) // 32, np.int32)
    begin = time.monotonic()
    for number in range(most_tokens):
        walked_s = time.monotonic() - begin
        is_brisk = number == SHORT_WALK_TOKENS and walked_s < BRISK_S
        if matcher.is_terminated() or is_brisk or walked_s > WALK_S:
            break
        matcher.fill_mask(mask)
        token_id = _allowed_from(draw.randrange(vocab_size), int.from_bytes(mask, "little"))
        if token_id is None:
            raise GrammarStuck("no token can continue it")
        matcher.accept(token_id)
    return time.monotonic() - begin < BRISK_S


def _allowed_from(first: int, bits: int) -> int | None:
    """Return the next allowed token from `first` on, around; a tenth of listing them all."""
    left = bits >> first
    if not left:
        first, left = 0, bits
    return first + (left & -left).bit_length() - 1 if left else None


def _limit_memory(extra_bytes: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + extra_bytes
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _say(answer: str) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
