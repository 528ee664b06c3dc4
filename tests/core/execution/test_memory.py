"""How much memory is left, read from files as Linux writes them."""

from pathlib import Path

import pytest

from quire.execution import memory
from quire.execution.memory import GIB, MemoryBudget, default_cpu_kv_bytes, describe_bytes

MIB = 1 << 20


class FakeMachine:
    """A root folder with /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, *, available: int) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n")

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def group(self, path: str, *, limit: object, used: int, inactive: int = 0) -> None:
        self.write(f"sys/fs/cgroup/{path}/memory.max", limit)
        self.write(f"sys/fs/cgroup/{path}/memory.current", used)
        self.write(f"sys/fs/cgroup/{path}/memory.stat", f"anon 5\ninactive_file {inactive}")

    def old_group(self, path: str, *, limit: int, used: int, inactive: int = 0) -> None:
        self.write(f"sys/fs/cgroup/memory/{path}/memory.limit_in_bytes", limit)
        self.write(f"sys/fs/cgroup/memory/{path}/memory.usage_in_bytes", used)
        text = f"inactive_file 1\ntotal_inactive_file {inactive}"
        self.write(f"sys/fs/cgroup/memory/{path}/memory.stat", text)

    def left(self) -> int:
        return memory.host_memory_left(self.root)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path, available=64 * GIB)


def test_machine_without_control_groups_has_what_is_available(machine: FakeMachine) -> None:
    assert machine.left() == 64 * GIB


def test_control_group_of_a_container_limits(machine: FakeMachine) -> None:
    machine.write("proc/self/cgroup", "0::/")
    machine.group("", limit=8 * GIB, used=3 * GIB)

    assert machine.left() == 5 * GIB


def test_page_cache_that_can_be_given_back_counts_as_left(machine: FakeMachine) -> None:
    machine.write("proc/self/cgroup", "0::/")
    machine.group("", limit=8 * GIB, used=7 * GIB, inactive=2 * GIB)

    assert machine.left() == 3 * GIB


def test_tightest_of_nested_control_groups_limits(machine: FakeMachine) -> None:
    machine.write("proc/self/cgroup", "0::/a/b/c")
    machine.group("a", limit=10 * GIB, used=4 * GIB)
    machine.group("a/b", limit=5 * GIB, used=2 * GIB)
    machine.group("a/b/c", limit="max", used=1 * GIB)
    machine.group("a/other", limit=1 * GIB, used=1 * GIB)

    assert machine.left() == 3 * GIB


def test_group_without_a_limit_does_not_limit(machine: FakeMachine) -> None:
    machine.write("proc/self/cgroup", "0::/a")
    machine.group("a", limit="max", used=1 * GIB)

    assert machine.left() == 64 * GIB


def test_group_beyond_its_limit_leaves_nothing(machine: FakeMachine) -> None:
    machine.write("proc/self/cgroup", "0::/")
    machine.group("", limit=2 * GIB, used=3 * GIB)

    assert machine.left() == 0


@pytest.mark.parametrize("controllers", ["memory", "memory,hugetlb"])
def test_first_version_of_control_groups_limits(machine: FakeMachine, controllers: str) -> None:
    machine.write("proc/self/cgroup", f"5:cpu,cpuacct:/x\n4:{controllers}:/docker/abc\n0::/y")
    machine.old_group("docker", limit=9 * GIB, used=1 * GIB)
    machine.old_group("docker/abc", limit=6 * GIB, used=4 * GIB, inactive=1 * GIB)

    assert machine.left() == 3 * GIB


def test_first_version_spells_no_limit_as_a_huge_number(machine: FakeMachine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/")
    machine.old_group("", limit=(2**63 - 1) // 4096 * 4096, used=4 * GIB)

    assert machine.left() == 64 * GIB


def test_machine_that_tells_nothing_is_taken_for_a_small_one(tmp_path: Path) -> None:
    assert memory.host_memory_left(tmp_path) == 8 * GIB


@pytest.mark.parametrize(("left", "expected"), [(100 * GIB, 4 * GIB), (5 * GIB, 2 * GIB), (0, 0)])
def test_kv_cache_on_a_cpu_takes_the_smaller_of_4_gib_and_40_percent(
    left: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory_left", lambda: left)

    assert default_cpu_kv_bytes() == expected


def test_this_process_has_memory_left() -> None:
    assert 0 < memory.host_memory_left() < 1 << 50


def test_budget_items_add_up_to_the_total() -> None:
    budget = MemoryBudget(
        total=100, weights=40, activations=7, workspace=3, kv_blocks=30, graphs=2, measured=True
    )

    assert budget.free == 18
    assert sum(count for _, count in budget.items()) == budget.total


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * MIB, "5.0 MiB"),
        (4 * GIB, "4.00 GiB"),
        (3000 * GIB, "3000.00 GiB"),
    ],
)
def test_bytes_are_written_as_people_write_them(count: int, text: str) -> None:
    assert describe_bytes(count) == text
