"""Small random stories for the simulation: what arrives, what goes wrong, how the engine is set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from attrs import evolve, frozen
from fake_runner import VOCAB_SIZE

from quire.scheduling.output import KVCacheGroup

EVENTS = ("abort_at", "preempt_at", "stop_string_at", "fails_at")


@frozen(kw_only=True)
class Arrival:
    """One request, and what happens to it.

    `abort_at` and `preempt_at` count turns of the engine after its arrival; the latter takes the
    row of a sequence though no block is short. `stop_string_at` is the (index, number of tokens)
    after which the outside finishes a sequence; `fails_at` the (index, number of computed tokens)
    from which a row fails.
    """

    name: str
    turn: int
    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1
    salt: str = ""
    priority: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    abort_at: int | None = None
    preempt_at: int | None = None
    stop_string_at: tuple[int, int] | None = None
    fails_at: tuple[int, int] | None = None


@frozen(kw_only=True)
class Scenario:
    """A story: it alone decides everything that happens in a run."""

    seed: int
    arrivals: tuple[Arrival, ...]
    block_sizes: tuple[int, ...]  # one a group
    num_usable_blocks: tuple[int, ...]
    windows: tuple[int | None, ...] = (None,)
    blocks_per_slab: tuple[int, ...] | None = None  # the first usable number counts slabs then
    steps_in_flight: int = 1
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 8
    max_model_len: int = 32
    prefix_caching: bool = True
    policy: str = "fcfs"
    aging_s: float = 1.0
    reset_cache_at: int | None = None

    def groups(self) -> list[KVCacheGroup]:
        """Return the groups of layers."""
        slabs = self.blocks_per_slab
        return [
            KVCacheGroup(
                layers=(g,),
                block_size=size,
                bytes_per_block=1,
                num_blocks=self.num_usable_blocks[0 if slabs else g] + 1,
                window=self.windows[g],
                blocks_per_slab=slabs[g] if slabs else None,
                block_stride=3 * self.num_usable_blocks[0] + 5,
            )
            for g, size in enumerate(self.block_sizes)
        ]

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of this length fits when all is free, in the windows it needs."""
        held = []
        for size, window in zip(self.block_sizes, self.windows, strict=True):
            read = num_tokens if window is None else window - 1 + self.max_num_batched_tokens
            most = max(
                last // size - max(0, last - read + 1) // size + 1 for last in range(num_tokens)
            )
            held.append(most)
        if self.blocks_per_slab is None:
            return all(most <= n for most, n in zip(held, self.num_usable_blocks, strict=True))
        slabs = [-(-most // k) for most, k in zip(held, self.blocks_per_slab, strict=True)]
        return sum(slabs) <= self.num_usable_blocks[0]

    def lines(self) -> list[str]:
        """Return the story as readable lines."""
        engine = ", ".join(
            f"{name} {getattr(self, name)}"
            for name in Scenario.__slots__
            if name not in ("arrivals", "__weakref__")
        )
        told = [f"engine: {engine}"]
        for a in self.arrivals:
            extras = [
                f"{name} {getattr(a, name)}"
                for name in ("n", "salt", "priority", "stop_token_ids", "min_tokens")
                if getattr(a, name) not in (0, "", frozenset())
            ]
            events = [
                f"{name} {getattr(a, name)}" for name in EVENTS if getattr(a, name) is not None
            ]
            about = ", ".join([f"prompt {list(a.prompt)}, max_tokens {a.max_tokens}", *extras])
            told.append("  ".join([f"turn {a.turn}: {a.name} arrives: {about}", *events]))
        return told


def draw_scenario(seed: int) -> Scenario:
    """Draw a story from a seed: small pools and small alphabets, so that things collide."""
    rng = random.Random(seed)
    num_groups = 2 if rng.random() < 0.25 else 1
    block_sizes = tuple(rng.choice((1, 2, 4, 4, 8)) for _ in range(num_groups))
    kinds = random.Random(-seed - 1)  # of its own: windows change nothing else
    has_windows = kinds.random() < 0.4
    windows = tuple(_draw_window(kinds) if has_windows else None for _ in block_sizes)
    slabs = tuple(kinds.choice((1, 1, 2, 3)) for _ in block_sizes)
    shares = num_groups > 1 and kinds.random() < 0.7
    max_model_len = rng.choice((12, 20, 28))
    tight = rng.random() < 0.6
    spare = rng.choice((0, 0, 1, 2, 4)) if tight else rng.choice((8, 20))
    arrivals = tuple(
        _draw_arrival(rng, number, max_model_len)
        for number in range(rng.choice((1, 2, 3, 4, 5, 6)))
    )
    longest = max(min(len(a.prompt) + a.max_tokens, max_model_len) for a in arrivals)
    shorter = rng.random() < 0.05  # then some request can never fit
    return Scenario(
        seed=seed,
        arrivals=arrivals,
        block_sizes=block_sizes,
        windows=windows,
        blocks_per_slab=slabs if shares else None,
        num_usable_blocks=_usable(
            block_sizes, slabs if shares else None, longest, spare - shorter * rng.randint(1, 2)
        ),
        steps_in_flight=rng.choice((1, 1, 2, 2, 3)),
        max_num_seqs=rng.choice((1, 2, 3, 4, 8)),
        max_num_batched_tokens=rng.choice((1, 2, 3, 5, 8, 16, 64)),
        max_model_len=max_model_len,
        prefix_caching=rng.random() < 0.8,
        policy=rng.choice(("fcfs", "priority")),
        aging_s=rng.choice((0.25, 1.0, 4.0)),
        reset_cache_at=rng.randrange(30) if rng.random() < 0.1 else None,
    )


def _draw_window(rng: random.Random) -> int | None:
    return rng.choice((None, None, 1, 2, 3, 5, 8))


def _usable(
    block_sizes: tuple[int, ...], slabs: tuple[int, ...] | None, longest: int, spare: int
) -> tuple[int, ...]:
    """Return blocks of each group, or slabs, for the longest sequence without its windows."""
    blocks = [-(-longest // size) for size in block_sizes]
    if slabs is not None:
        counted = sum(-(-count // k) for count, k in zip(blocks, slabs, strict=True))
        return (max(1, counted + spare),) * len(block_sizes)
    return tuple(max(1, count + spare) for count in blocks)


def _draw_arrival(rng: random.Random, number: int, max_model_len: int) -> Arrival:
    # Prompts are prefixes of a few texts with a tail of their own, so that they share beginnings.
    text = random.Random(rng.randrange(2))
    shared = [text.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 0, 4, 8, 12, 16)))]
    tail = [rng.randrange(4) for _ in range(rng.choice((0, 1, 1, 2, 3, 5)))]
    longest = max_model_len if rng.random() < 0.05 else max_model_len - 1
    prompt = tuple((shared + tail)[:longest]) or (1,)
    n = rng.choice((1, 1, 1, 2, 3))
    max_tokens = rng.choice((1, 2, 3, 5, 8, 12))
    stops = frozenset(rng.sample(range(VOCAB_SIZE), rng.choice((0, 0, 1, 3))))
    fate = rng.random()
    return Arrival(
        name=f"r{number}",
        turn=rng.choice((0, 0, 0, 1, 2, 5, 9)),
        prompt=prompt,
        max_tokens=max_tokens,
        n=n,
        salt=rng.choice(("", "", "", "tenant")),
        priority=rng.choice((0, 0, 1, 3, -2)),
        stop_token_ids=stops,
        min_tokens=rng.choice((0, 0, 0, min(2, max_tokens))),
        abort_at=rng.randrange(14) if fate < 0.2 else None,
        preempt_at=rng.randrange(10) if rng.random() < 0.1 else None,
        stop_string_at=(rng.randrange(n), rng.randint(1, 4)) if 0.2 <= fate < 0.3 else None,
        fails_at=(rng.randrange(n), rng.randint(1, 20)) if 0.3 <= fate < 0.37 else None,
    )


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Return a smaller story that fails too: no single simplification of it does."""
    while True:
        for smaller in _simpler(scenario):
            if fails(smaller):
                scenario = smaller
                break
        else:
            return scenario


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    for i in range(len(scenario.arrivals)):
        rest = scenario.arrivals[:i] + scenario.arrivals[i + 1 :]
        if rest:
            yield evolve(scenario, arrivals=rest)
    for i, arrival in enumerate(scenario.arrivals):
        for simpler in _simpler_arrivals(arrival):
            yield evolve(
                scenario,
                arrivals=(*scenario.arrivals[:i], simpler, *scenario.arrivals[i + 1 :]),
            )
    plain = {
        "reset_cache_at": None,
        "policy": "fcfs",
        "prefix_caching": False,
        "windows": (None,) * len(scenario.windows),
    }
    for name, value in plain.items():
        if getattr(scenario, name) != value:
            yield evolve(scenario, **{name: value})
    if scenario.steps_in_flight > 1:
        yield evolve(scenario, steps_in_flight=scenario.steps_in_flight - 1)
    if len(scenario.block_sizes) > 1:
        yield evolve(
            scenario,
            block_sizes=scenario.block_sizes[:1],
            num_usable_blocks=scenario.num_usable_blocks[:1],
            windows=scenario.windows[:1],
            blocks_per_slab=None,
        )


def _simpler_arrivals(a: Arrival) -> Iterator[Arrival]:
    plain = Arrival(name=a.name, turn=a.turn, prompt=a.prompt, max_tokens=a.max_tokens)
    for name in (*EVENTS, "stop_token_ids", "min_tokens", "salt"):
        if getattr(a, name) != getattr(plain, name):
            yield evolve(a, **{name: getattr(plain, name)})
    if a.n > 1:
        yield evolve(a, n=a.n - 1)
    if a.priority:
        yield evolve(a, priority=0)
    if a.turn:
        yield evolve(a, turn=0)
    if a.max_tokens > 1:
        yield evolve(a, max_tokens=a.max_tokens - 1, min_tokens=0)
    if len(a.prompt) > 1:
        yield evolve(a, prompt=a.prompt[: len(a.prompt) // 2])
        yield evolve(a, prompt=a.prompt[:-1])
