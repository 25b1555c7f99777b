"""Runs killed with SIGKILL at random moments, during a save too, then resumed: they end with the weights of a whole run.

    python -m pytest tests/test_kill.py --kills 100      # 100 of each script; 4 without the flag
"""

import importlib
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import metrics, weights, without_times
from minibridge import checkpoint
from minibridge.config import run_main

FORK = multiprocessing.get_context("forkserver")  # children start with torch imported, in no time
FORK.set_forkserver_preload(["torch", "train_rl", "train_sft"])
DEADLINE = 120  # seconds, after which a child is taken to hang


SCRIPTS = {
    "train_sft": "--model {model} --data {sft} --batch-size 6 --epochs 3 --learning-rate .003",
    "train_rl": "--model {model} --data {rl} --prompts 3 --samples 4 --max-new-tokens 8 --steps 6 --learning-rate .01"
                " --show-every 0"}


def child(name: str, words: list[str], kind: str, moment: float):
    """Run the script and, if `kind` is not "time", die at that function call, counted everywhere or inside saves only;
    a run that comes to its end leaves their number in a file."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    seen = saving = 0
    saves = {checkpoint.save_training.__code__, checkpoint.save.__code__, checkpoint.prune.__code__}

    def count(frame, event, argument):
        nonlocal seen, saving
        if frame.f_code in saves and event in ("call", "return"):
            saving += 1 if event == "call" else -1
        if event in ("call", "c_call") and (kind == "anywhere" or saving):
            seen += 1
            if seen == round(moment):
                os.kill(os.getpid(), signal.SIGKILL)

    script = importlib.import_module(name)
    if kind != "time":
        sys.setprofile(count)
    status = run_main(script.main, script.Config, words)
    sys.setprofile(None)
    Path(words[-1], kind).write_text(str(seen))
    sys.exit(status)


def run(name: str, words: str, kind: str = "time", moment: float = math.inf) -> int:
    """Exit status of the script; killed, it is -9. A moment of the kind "time" is in seconds from the start."""
    process = FORK.Process(target=child, args=(name, words.split(), kind, moment), daemon=True)
    process.start()
    if kind == "time" and moment < math.inf:
        process.join(moment)
        process.kill()
    process.join(DEADLINE)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def last_moments(name: str, words: str, folder: Path) -> dict[str, float]:
    """Of a whole run: its seconds, its function calls and those inside of saves."""
    began, moments = time.monotonic(), {}
    assert run(name, f"{words} --out {folder / 'time'}") == 0
    moments["time"] = time.monotonic() - began
    for kind in ("anywhere", "saving"):
        assert run(name, f"{words} --out {folder / kind}", kind, -1) == 0
        moments[kind] = int((folder / kind / kind).read_text())
    return moments


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_ends_like_a_whole_one(toy, guesser, tmp_path, request, name):
    words = SCRIPTS[name].format(model=guesser if name == "train_rl" else toy.model, sft=toy.sft, rl=toy.rl)
    words += " --device cpu --save-every 1"
    moments, whole = last_moments(name, words, tmp_path), tmp_path / "time"
    rng, killed, finished = random.Random(f"kill {name}"), 0, 0
    while killed < request.config.getoption("--kills") or not finished:
        out = tmp_path / f"run_{finished}"
        kind = rng.choice(sorted(moments))
        status = run(name, f"{words} --resume --out {out}", kind, rng.uniform(0, moments[kind]))
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        if status == 0:
            assert weights(out / "model") == weights(whole / "model")
            assert without_times(metrics(out)) == without_times(metrics(whole))
            names = sorted(path.name for path in (out / "checkpoints").iterdir())
            older = [[], ["step_3"], [".step_3.old"]]  # the latter two: killed before or while it made room
            assert names in [[*names, "step_4", "step_5"] for names in older]
            finished += 1
