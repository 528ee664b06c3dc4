"""How much memory there is, and what the engine does with it, item by item."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

GIB = 1 << 30
CPU_KV_LIMIT_BYTES = 4 * GIB
CPU_KV_SHARE = 0.4


@frozen(kw_only=True)
class MemoryBudget:
    """Bytes by item; `total` is what the engine may use, `free` what it leaves of that."""

    total: int
    weights: int
    activations: int
    workspace: int
    kv_blocks: int
    graphs: int
    measured: bool

    @property
    def free(self) -> int:
        """What is left of the total."""
        used = self.weights + self.activations + self.workspace + self.kv_blocks + self.graphs
        return self.total - used

    def items(self) -> list[tuple[str, int]]:
        """Return the items in the order in which they are printed."""
        return [
            ("weights", self.weights),
            ("KV blocks", self.kv_blocks),
            ("activations", self.activations),
            ("backend workspace", self.workspace),
            ("graphs", self.graphs),
            ("free", self.free),
        ]


def describe_bytes(count: int) -> str:
    """Return a number of bytes as people write it."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def host_memory_left(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take: the machine's or its control group's.

    `root` is where `/proc` and `/sys` are found.
    """
    left = _available(root / "proc/meminfo")
    for limit, used, reclaimable in _control_groups(root):
        left = min(left, max(0, limit - used + reclaimable))
    return left


def _available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 * GIB


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # "max" means no limit.
        return None


def _control_groups(root: Path) -> list[tuple[int, int, int]]:
    """Return (limit, used, page cache that can be given back) of each limiting control group."""
    found = []
    for folder in _group_folders(root / "sys/fs/cgroup", root / "proc/self/cgroup"):
        limit = _read_number(folder / "memory.max")
        used = _read_number(folder / "memory.current")
        if limit is None:
            limit = _read_number(folder / "memory.limit_in_bytes")
            used = _read_number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < 1 << 60:
            found.append((limit, used, _inactive_file(folder)))
    return found


def _group_folders(root: Path, membership: Path) -> list[Path]:
    folders = [root, root / "memory"]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            base = root / "memory" if controllers else root
            current = base / path.lstrip("/")
            while current != base and base in current.parents:
                folders.append(current)
                current = current.parent
    return folders


def _inactive_file(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        numbers = dict(line.split() for line in lines)
        # The first version counts a group's children under a name of their own.
        return int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def default_cpu_kv_bytes() -> int:
    """Return the memory for KV blocks on a CPU where the user gives none."""
    return min(CPU_KV_LIMIT_BYTES, int(CPU_KV_SHARE * host_memory_left()))
