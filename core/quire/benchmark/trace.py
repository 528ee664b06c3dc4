"""Read a Chrome trace: what a step's time was spent on, by kernel or operator, and on nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define, frozen

DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
HOST_CATEGORY = "cpu_op"
ELEMENT_BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2}
Event = Mapping[str, Any]


@define
class Spent:
    """Time of one kernel or operator; FLOPs and bytes where every call's shapes are known."""

    name: str
    calls: int = 0
    us: float = 0.0
    flops: int | None = 0
    num_bytes: int | None = 0

    def add(self, us: float, product: Product | None) -> None:
        """Count one call."""
        self.calls += 1
        self.us += us
        if product is None or self.flops is None or self.num_bytes is None:
            self.flops = self.num_bytes = None
        else:
            self.flops += product.flops
            self.num_bytes += product.num_bytes


@frozen(kw_only=True)
class Product:
    """What a matrix product computes, and what it reads and writes at least."""

    flops: int
    num_bytes: int


@frozen(kw_only=True)
class Timeline:
    """Where time went, most first; `busy_us` is the time in which anything ran."""

    spent: list[Spent]
    busy_us: float
    span_us: float


def read(path: Path) -> list[Event]:
    """Return the complete events of a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def on_device(events: Iterable[Event]) -> Timeline:
    """Return what a GPU spent its time on; without graphs products are known by their shapes.

    A kernel that begins while one before it ends mostly waits for it, and has the time after that.
    """
    events = list(events)
    ran = [event for event in events if event.get("cat") in DEVICE_CATEGORIES]
    known = {id(event): product for event, product in _products(events)}
    spent: dict[str, Spent] = {}
    reached = -math.inf
    for event in sorted(ran, key=lambda e: e["ts"]):
        own_us = max(0.0, _end(event) - max(reached, event["ts"]))
        reached = max(reached, _end(event))
        name = event["name"]
        spent.setdefault(name, Spent(name)).add(own_us, known.get(id(event)))
    return _timeline(spent, ran)


def products_of(events: Iterable[Event]) -> list[tuple[str, Product]]:
    """Return the kernels that compute matrix products of known shapes, a name a call."""
    return [(event["name"], product) for event, product in _products(list(events))]


def _products(events: Sequence[Event]) -> list[tuple[Event, Product]]:
    operators = [event for event in events if event.get("cat") == HOST_CATEGORY]
    products = {_external_id(event): product_of(event) for event in operators}
    # An operator may launch several kernels, of which the longest computes the product.
    longest: dict[Any, Event] = {}
    ran = (event for event in events if event.get("cat") in DEVICE_CATEGORIES)
    for event in sorted(ran, key=lambda e: e["dur"]):
        longest[_external_id(event)] = event
    found = ((event, products.get(number)) for number, event in longest.items())
    return [(event, product) for event, product in found if product is not None]


def _external_id(event: Event) -> Any:
    """Return the number that links a kernel with the operator that launched it."""
    return event.get("args", {}).get("External id")


def on_host(events: Iterable[Event]) -> Timeline:
    """Return what operators spent on a CPU, each without the operators inside it."""
    threads: dict[Any, list[Event]] = {}
    for event in events:
        if event.get("cat") == HOST_CATEGORY:
            threads.setdefault(event.get("tid"), []).append(event)
    spent: dict[str, Spent] = {}
    for thread in threads.values():
        for event, own_us in _own_times(thread):
            name = event["name"]
            spent.setdefault(name, Spent(name)).add(own_us, product_of(event))
    return _timeline(spent, [event for thread in threads.values() for event in thread])


def _own_times(thread: Sequence[Event]) -> list[tuple[Event, float]]:
    """Return each event's time without that of the events inside it."""
    own: list[list[Any]] = []
    open_events: list[int] = []
    # Of two that begin together the longer one holds the other.
    for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
        while open_events and _end(own[open_events[-1]][0]) <= event["ts"]:
            open_events.pop()
        if open_events:
            own[open_events[-1]][1] -= event["dur"]
        open_events.append(len(own))
        own.append([event, event["dur"]])
    return [(event, max(0.0, us)) for event, us in own]


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def _timeline(spent: Mapping[str, Spent], ran: Sequence[Event]) -> Timeline:
    busy, reached = 0.0, -math.inf
    for event in sorted(ran, key=lambda e: e["ts"]):
        busy += max(0.0, _end(event) - max(reached, event["ts"]))
        reached = max(reached, _end(event))
    begin = min((event["ts"] for event in ran), default=0.0)
    return Timeline(
        spent=sorted(spent.values(), key=lambda s: -s.us),
        busy_us=busy,
        span_us=reached - begin if ran else 0.0,
    )


def product_of(event: Event) -> Product | None:
    """Return what an operator that is one matrix product computes; None for any other."""
    args = event.get("args", {})
    shapes, types = args.get("Input Dims", []), args.get("Input type", [])
    where = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "mkldnn::_linear_pointwise": 0}
    first = where.get(event["name"])
    if first is None or len(shapes) < first + 2 or len(types) <= first:
        return None
    a, b = shapes[first], shapes[first + 1]
    element = ELEMENT_BYTES.get(types[first])
    if element is None or len(a) < 2 or len(b) < 2:
        return None
    # A linear layer's weight is [outputs, inputs], the second factor of others [inputs, outputs].
    outputs = b[-2] if event["name"].startswith("mkldnn") else b[-1]
    rows, inputs = math.prod(a[:-1]), a[-1]
    num_elements = rows * inputs + math.prod(b) + rows * outputs
    return Product(flops=2 * rows * inputs * outputs, num_bytes=num_elements * element)
