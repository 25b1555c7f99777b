"""Run folders: what ran, with which settings and versions, and a line of numbers for every step. Only stdlib."""
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minibridge.config import InputError, json_line, plain, read_json, whole_lines, write_whole

RUN_FILES = ("metrics.jsonl", "rollouts", "model", "seed_*", "table.md", "*.csv", "rollouts.jsonl", "validation.jsonl",
             "ranked.jsonl", "init", "toy_base", "small_base",  # by the commands that have a run folder
             "config.json")  # of a model's folder
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")  # versions kept in run.json


def same_settings(folder: str | Path, config: Any, but: Sequence[str] = ()) -> None:
    """Raise InputError if `folder`/run.json was made with other settings, naming those that differ; `but` may differ."""
    before, now = settings_before(folder, config), json.loads(json_line(dataclasses.asdict(config)))
    differing = [name for name in now if before is not None and name not in but and before[name] != now[name]]
    if differing:
        changes = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in differing)
        raise InputError(f"{Path(folder) / 'run.json'}: made with other settings: {changes}; choose another --out")


def settings_before(folder: str | Path, config: Any) -> dict | None:
    """Those in `folder`/run.json, None without one. Raises InputError if a command without `config`'s options wrote it."""
    path = Path(folder) / "run.json"
    if not path.exists():
        if found := next(iter(strangers(Path(folder))), None):
            raise InputError(f"{folder}: holds {found}, but no run.json to say of which run; choose another --out")
        return None
    before = read_json(path).get("config")
    missing = {field.name for field in dataclasses.fields(config)} - (before.keys() if isinstance(before, dict) else set())
    if missing:
        raise InputError(f"{path}: not the record of such a run, but of another command or version (it has no "
                         f"{min(missing)}); choose another --out")
    return before


def strangers(folder: Path) -> list[str]:
    """What a folder holds that a run might replace or take for its own; nothing that is empty."""
    found = [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))]
    return [path.name for path in found if (any(path.iterdir()) if path.is_dir() else path.stat().st_size)]


class Run:
    """A run folder: run.json (what ran), metrics.jsonl (an object a step), and what the script puts beside.

    A new run starts metrics.jsonl afresh. With `resume_step=k`, k being the first step that will run (again),
    the lines of steps before k stay and the later ones go, so that no step is logged twice. `facts` go into run.json.
    `run.path` is the folder: `run.path / "checkpoints"`. `steps` is the total on the console.
    """

    def __init__(self, folder: str | Path, config: Any, device: Any, steps: int | None = None,
                 resume_step: int | None = None, **facts: Any):
        self.path, self.steps = Path(folder), steps
        self.path.mkdir(parents=True, exist_ok=True)
        self.metrics = self.path / "metrics.jsonl"
        write_whole(self.metrics, "" if resume_step is None else _lines_before(self.metrics, resume_step))
        self.started = time.monotonic()
        self.record = record(config, device, resume_step=resume_step, **facts)
        write_record(self.path / "run.json", self.record)

    def log(self, step: int, console: Sequence[str] | None = None, **numbers: Any) -> None:
        """Append to metrics.jsonl; print the numbers named in `console` (default: all; empty: no line)."""
        self._check_own()
        try:
            with open(self.metrics, "a", encoding="utf-8", newline="\n") as file:
                file.write(json_line({"step": step} | numbers))
        except OSError as error:  # a full disk's error does not name the file
            raise InputError(f"{self.metrics}: not written ({error.strerror})") from None
        names = [name for name in (numbers if console is None else console) if name in numbers]
        if names:
            width, total = (5, "") if self.steps is None else (len(str(self.steps)), f"/{self.steps}")
            cells = [f"step {step:{width}d}{total}"]
            cells += [f"{name} {_short(numbers[name]):<9}" for name in names]  # 9: a %.4g such as 1.234e-06
            print(" | ".join(cells).rstrip(), flush=True)

    def finish(self, **results: Any) -> None:
        """Add the wall-clock seconds since this start, and the results given, to run.json."""
        self._check_own()
        self.record |= {"seconds": round(time.monotonic() - self.started, 1)} | results
        write_record(self.path / "run.json", self.record)

    def _check_own(self) -> None:
        """InputError if another process has begun a run here: the folder is its now."""
        path, own = self.path / "run.json", self.record["process"]
        if path.exists() and read_json(path).get("process", own) != own:
            raise InputError(f"{self.path}: another process has begun a run here, so this one ends")


def record(config: Any, device: Any, **facts: Any) -> dict[str, Any]:
    """What runs now: settings, command line, process, device, time, versions, commit, and the facts given."""
    return {
        "config": dataclasses.asdict(config),
        "argv": sys.argv,
        "process": os.getpid(),
        "device": str(device),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
    } | _commit() | facts


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_whole(path, json.dumps(plain(record), ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def _short(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines_before(path: Path, step: int) -> str:
    if not path.exists():
        return ""
    rows = whole_lines(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise InputError(f"{path}:{number}: has no step")
    return "".join(json_line(row) for row in rows if row["step"] < step)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass  # data generation runs without torch
    return versions


def _commit() -> dict[str, str]:
    """The commit of this source tree, "-dirty" if changed; nothing outside a work tree or without git."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, check=True, text=True,
                              capture_output=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")}
    except (OSError, subprocess.CalledProcessError):
        return {}
