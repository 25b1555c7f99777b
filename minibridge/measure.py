"""Rates of a device and of functions on it: what `bench` prints, and what training logs measure themselves by."""
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minibridge.config import InputError, option, write_whole


@dataclass(frozen=True)
class Row:
    """One measurement; `limit_share` is ours / limit."""
    work: str
    shape: str
    device: str
    ours: float
    peer: str
    peer_value: float
    ratio: float
    unit: str
    limit: float
    limit_share: float


def row(config, work: str, unit: str, ours: list[float], peer: str = "", peer_found: list[float] = (), limit: float = 0.0):
    value, other = statistics.median(ours), statistics.median(peer_found or [0.0])
    cuda = config.device.startswith("cuda") or config.device == "auto" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    return Row(work, config.shape, device, value, peer, other, value / other if other else 0.0, unit, limit,
               value / limit if limit else 0.0)


def report(config, rows: list[Row]):
    print("| work | shape | unit | ours | peer | its figure | ratio | limit | share of it |\n" + "|---" * 9 + "|")
    for r in rows:
        numbers = (r.ours, r.peer_value, r.ratio, r.limit)
        cells = [f"{number:,.3g}" if number < 1000 else f"{number:,.0f}" for number in numbers]
        ours, theirs, ratio, limit = (cell if cell != "0" else "" for cell in cells)
        share = f"{r.limit_share:.0%}" if r.limit else ""
        print(f"| {r.work} | {r.shape} | {r.unit} | {ours} | {r.peer} | {theirs} | {ratio} | {limit} | {share} |")
    if config.json:
        write_whole(config.json, json.dumps([asdict(r) for r in rows], indent=1) + "\n")


@dataclass(frozen=True)
class Repeats:
    """What every command of `bench` has."""
    repeats: int = option(5, "repeats that count", least=1)
    json: str | None = option(None, "new file for the rows")

    def __post_init__(self):
        if self.json is not None and Path(self.json).exists():
            raise InputError(f"json: {self.json} is there already; remove it or choose another")


def clock() -> float:
    """Seconds, when all work given to the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rates(repeats: int, *functions: Callable[[], int]) -> list[list[float]]:
    """Units of work per second of each function, which returns how many it did. They take turns: one warm-up round, then
    `repeats` timed ones."""
    measured: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, found in zip(functions, measured):
            started = clock()
            done = function()
            found.append(done / (clock() - started))
    return [found[1:] for found in measured]


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a square matrix product, by default one that takes little time."""
    cuda = device.type == "cuda"
    size, count = size or (4096 if cuda else 768), 4 if cuda else 1  # a CPU without bf16 units takes a second for one
    a = torch.randn(size, size, device=device).to(dtype)

    def products() -> int:
        for _ in range(count):
            a @ a
        return count * 2 * size**3

    return max(rates(3, products)[0])


def bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes read per second from memory."""
    x = torch.ones(megabytes * 2**18, device=device)

    def read() -> int:
        x.sum()
        return megabytes * 2**20

    return max(rates(5, read)[0])


def peak_memory(device: torch.device, function: Callable[[], object]) -> float:
    """Bytes in use at the highest, above those before: of the device, or resident (Linux) for the CPU."""
    start_peak(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
    function()
    return highest_memory(device) - before


def start_peak(device: torch.device):
    """`highest_memory` counts from here; from the start of the process where Linux's /proc is not to be written."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def highest_memory(device: torch.device) -> float:
    """Bytes of tensors on a GPU at the highest; for the CPU those resident of the whole process, NaN if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") or math.nan


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at the highest ("VmHWM"); 0 if there is no /proc to say."""
    return _read_kib("/proc/self/status", field)


def free_memory(device: torch.device) -> int:
    """Bytes that this process has or could have: of the device, or of the machine as Linux sees it, or else all of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    available = _read_kib("/proc/meminfo", "MemAvailable")
    return available + resident() if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_kib(path: str, field: str) -> int:
    """Bytes of a line such as "VmRSS:   123 kB"; 0 if the file or the line is not there."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
