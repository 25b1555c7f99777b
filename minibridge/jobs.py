"""Jobs side by side, each in a process of its own that prints into a file of its own.

A job is one arm of `reproduce` at one seed: settings with `seed` and the folder `out`, and the arm's name.
"""
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from minibridge.config import InputError

Job = tuple[Any, str]  # settings, arm
REPORTS = 60  # seconds between two


def side_by_side(run: Callable[[Any, str], None], jobs: list[Job], workers: int):
    """run(settings, arm) of each job, `workers` at a time. The first that fails ends the others, which have checkpoints."""
    waiting, running, threads = list(jobs), {}, max(1, torch.get_num_threads() // workers)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                process = get_context("spawn").Process(target=run_logged, args=(run, *job, threads))
                process.start()
                print(f"started: seed {job[0].seed}, {job[1]}; log: {log_of(*job)}", flush=True)
                running[process.sentinel] = process, job
            ended = connection.wait(running, timeout=REPORTS)
            if not ended:
                report(job for _, job in running.values())
            for sentinel in ended:
                process, (one, arm) = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    said = lines_of_log(one, arm) if process.exitcode > 0 else ["killed"]
                    raise InputError(f"seed {one.seed}, {arm}: {said[-1] if said else 'failed'}")
                print(f"done: seed {one.seed}, {arm}", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        signal.signal(signal.SIGTERM, before)


def report(jobs: Iterable[Job]):
    """Prints how far each job has come, by the last line of its log that says so."""
    for one, arm in jobs:
        if newest := [line for line in lines_of_log(one, arm) if re.match("step +[0-9]|=== ", line)][-1:]:
            print(f"{time.strftime('%H:%M')}  seed {one.seed}, {arm}: {newest[0].removeprefix('=== ')}", flush=True)


def log_of(config: Any, arm: str) -> Path:
    return Path(config.out) / f"{arm}.log"


def lines_of_log(config: Any, arm: str) -> list[str]:
    path = log_of(config, arm)
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def run_logged(run: Callable[[Any, str], None], config: Any, arm: str, threads: int):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(threads)
    try:
        with open(log_of(config, arm), "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            run_reported(run, config, arm)
    except OSError as error:  # of the log
        sys.exit(f"{error}")


def run_reported(run: Callable[[Any, str], None], config: Any, arm: str):
    try:
        run(config, arm)
    except (InputError, OSError) as error:
        print(error)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
