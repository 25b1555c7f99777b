"""Two processes (gloo, on the CPU) against one: the same losses, rollouts and files, sharded or not; and how they end."""

import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

import train_rl
import train_sft
from conftest import metrics, scripted_model
from minibridge import checkpoint, parallel, replay
from minibridge.config import InputError, read_jsonl, run_main
from minibridge.opening import pick_device

FORK = multiprocessing.get_context("forkserver")  # children start with torch imported, in no time
FORK.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "train_rl", "train_sft"])
DEADLINE = 120  # seconds, after which processes are taken to hang


def child(name: str, words: list[str], port: int, rank: int, sabotage):
    """What torchrun would start: the script, as one of two."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put in the background
    for stream in (1, 2):
        os.dup2(os.open(f"{words[-1]}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "TORCHELASTIC_RESTART_COUNT": "0"}
    script = importlib.import_module(name)
    if sabotage:
        sabotage(script, rank)
    sys.argv = [name, *words]
    sys.exit(parallel.run(script.main, script.Config))


def two(name: str, words: str, out: Path, sabotage=None, patience: float = DEADLINE, interrupt=None) -> list[int]:
    """Exit statuses of the two processes; what they say is in out.0.1, the first one's stdout, to out.1.2.

    `patience`: seconds that one gets to end by itself after the other, until it is told to, as torchrun would at once.
    `interrupt`: processes that get a Ctrl-C when the third step is logged.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps it, too: it outlives a process
    words = [*words.split(), "--out", str(out)]
    processes = [FORK.Process(target=child, args=(name, words, store.port, rank, sabotage), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    if interrupt:
        began = time.monotonic()
        while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
            assert time.monotonic() - began < DEADLINE and processes[0].is_alive()
            time.sleep(0.01)
        for rank in interrupt:
            os.kill(processes[rank].pid, signal.SIGINT)
    wait([process.sentinel for process in processes], DEADLINE)
    for process in processes:
        process.join(patience)
        if patience < DEADLINE:
            process.terminate()
        process.join(1)
        if hangs := process.exitcode is None:
            process.kill()
        assert not hangs, "it hangs"
    return [process.exitcode for process in processes]


def said(out: Path) -> str:
    """What both wrote to stderr, but for torch's own warnings."""
    lines = [line for rank in (0, 1) for line in Path(f"{out}.{rank}.2").read_text().splitlines(keepends=True)]
    own = ("[rank", "[W", "Exception raised from", "frame #", "<omitting", "\n")  # with the stack of its C++
    return "".join(line for line in lines if not line.startswith(own) and "c10d_functional" not in line
                   and "before the output tensors" not in line)


SFT = ("--model {model} --data {sft} --val {sft} --batch-size 5 --epochs 2 --learning-rate .003 --save-every 2"
       " --eval-every 1 --micro-tokens 400 --device cpu")
RL = ("--model {guesser} --data {rl} --val {rl} --prompts 3 --samples 4 --max-new-tokens 8 --steps 4 --learning-rate .01"
      " --kl-coef .1 --updates 2 --refill 2 --checkpointing --save-every 2 --eval-every 2 --micro-tokens 400 --device cpu"
      " --seed 3")  # no gradient that nearly cancels, of whose rounding Adam would make a step


@pytest.fixture(scope="module")
def words(toy, guesser) -> dict[str, str]:
    names = {"model": toy.model, "sft": toy.sft, "rl": toy.rl, "guesser": guesser}
    return {"train_sft": SFT.format(**names), "train_rl": RL.format(**names)}


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> dict[str, Path]:
    """Runs of one process."""
    out = tmp_path_factory.mktemp("alone")
    for script in (train_sft, train_rl):
        flags = f"{words[script.__name__]} --out {out / script.__name__}"
        assert run_main(script.main, script.Config, flags.split()) == 0
    return {name: out / name for name in words}


def tensors(path: Path, ends: str) -> dict[str, torch.Tensor]:
    return {f"{file.relative_to(path)}/{name}": tensor for file in path.rglob(f"*{ends}.safetensors")
            for name, tensor in load_file(file).items()}


def assert_same_run(out: Path, whole: Path):
    """The same files; numbers within rounding."""
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(whole) for path in whole.rglob("*")}
    for ends, most in (("model", 2e-6), ("training", 2e-7)):
        one, other = tensors(out, ends), tensors(whole, ends)
        assert one.keys() == other.keys() and len(one) > 10
        for name in one:
            assert one[name].shape == other[name].shape and one[name].dtype == other[name].dtype
            assert (one[name] - other[name]).abs().max() < most, name
    assert len(metrics(out)) == len(metrics(whole)) > 3
    for one, other in zip(metrics(out), metrics(whole)):
        assert one.keys() == other.keys()
        for name in one.keys() - {"padding", "seconds", "decode_seconds", "tokens_per_second", "utilisation", "memory_gib"}:
            noise = 5e-6 if name.startswith("mismatch") else 2e-8
            assert one[name] == pytest.approx(other[name], rel=1e-6, abs=noise), (one["step"], name)
    for path in out.glob("rollouts/*"):
        for one, other in zip(read_jsonl(path), read_jsonl(whole / "rollouts" / path.name), strict=True):
            assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-5)
            assert one == other


def split(model) -> bool:
    """Whether this process holds about half of each parameter."""
    shares = [parameter.to_local().numel() / parameter.numel() for parameter in model.parameters()
              if hasattr(parameter, "to_local")]
    return len(shares) == len([*model.parameters()]) and all(0.4 < share < 0.6 for share in shares)


def all_is_split(script, rank):
    """Model, gradients, Adam's moments and the reference, before a step and after it."""
    def look(model, optimizer, *rest):
        assert split(model) and all(parameter.grad.placements == parameter.placements for parameter in model.parameters())
        norm = update(model, optimizer, *rest)
        assert all(moments["exp_avg"].placements == parameter.placements for parameter, moments in optimizer.state.items())
        return norm

    update, script.update = script.update, look
    if script.__name__ == "train_rl":
        script.optimizer_steps = partial(steps_and_look, script.optimizer_steps)


def steps_and_look(steps, model, reference, *rest):
    assert split(reference)
    found = steps(model, reference, *rest)
    assert split(reference)
    return found


@pytest.mark.parametrize("flag", ["--no-shard", "--shard"])
@pytest.mark.parametrize("name", ["train_sft", "train_rl"])
def test_two_processes_do_what_one_does_and_resume_one_another(words, alone, tmp_path, name, flag):
    """An odd number of rows and groups, so that one process has more micro-batches; validation, and for RL refilled
    batches and a second update. Then each way: one process goes on from what two have left, and two from what one has."""
    out, script = tmp_path / "two", importlib.import_module(name)
    assert two(name, f"{words[name]} {flag}", out, all_is_split if flag == "--shard" else None) == [0, 0]
    assert_same_run(out, alone[name])
    assert said(out) == "" and Path(f"{out}.1.1").read_text() == ""
    printed = Path(f"{out}.0.1").read_text()
    assert printed.count("\nstep ") == len(metrics(out)) and printed.endswith("model: written\n")
    for folder, resume in (
            (out, lambda words: [run_main(script.main, script.Config, words.split())]),
            (tmp_path / "one", lambda words: two(name, words.split(" --out ")[0], tmp_path / "one"))):
        if folder != out:
            shutil.copytree(alone[name], folder)
        shutil.rmtree(folder / "model")
        assert set(resume(f"{words[name]} {flag} --resume --out {folder}")) == {0}
        assert_same_run(folder, alone[name])


def test_answers_of_one_token_on_one_process_only(toy, tmp_path):
    """Without a second forward pass for them, the other process would wait for it for ever."""
    end, other = toy.tokenizer.end_of_turn_id, toy.tokenizer.encode("b")[0]
    model = scripted_model(toy.tokenizer.vocab_size, otherwise={end: 20.0, other: 20.0})
    checkpoint.save(model, tmp_path / "model", toy.tokenizer)
    flags = (f"--model {tmp_path / 'model'} --data {toy.rl} --prompts 2 --samples 2 --steps 8 --max-new-tokens 4"
             f" --device cpu --learning-rate 0 --micro-tokens 400 --entropy-coef .1 --save-every 4")
    assert two("train_rl", f"{flags} --shard", tmp_path / "two") == [0, 0]
    assert run_main(train_rl.main, train_rl.Config, [*flags.split(), "--out", str(tmp_path / "one")]) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")
    longest = [[max(len(line["ids"]) for line in read_jsonl(path) if line["group"] == group) for group in (0, 1)]
               for path in (tmp_path / "one" / "rollouts").iterdir()]
    assert any(min(pair) == 1 < max(pair) for pair in longest)


# ---- ends


def at_third_update(script, act):
    original, calls = script.update, []

    def update(*words):
        calls.append(words)
        if len(calls) == 3:
            act()
        return original(*words)

    script.update = update


def refuse():
    raise InputError("the second process finds fault")


def second_refuses(script, rank):
    if rank == 1:
        at_third_update(script, refuse)


def second_is_killed(script, rank):
    if rank == 1:
        at_third_update(script, lambda: os.kill(os.getpid(), signal.SIGKILL))


def second_has_no_finite_loss(script, rank):
    """And the first takes its time to write what it keeps of it."""
    def slow(*words):
        time.sleep(1)
        write(*words)

    def broken(*words):
        loss, found = loss_of(*words)
        return loss * (float("nan") if rank == 1 else 1.0), found

    if script.__name__ == "train_sft":
        write, script.write_jsonl = script.write_jsonl, slow
        loss_of, script.answer_loss = script.answer_loss, broken
    else:
        write, checkpoint.write_tensors = checkpoint.write_tensors, slow
        loss_of, script.share_of_loss = script.share_of_loss, broken


@pytest.mark.parametrize("flags, sabotage, message", [
    ("--lr 3", None, "error: unrecognized arguments: --lr 3 (see --help)"),
    ("--batch-size 1", None, "error: batch_size: 1 cannot be split among 2 processes"),
    ("--shard", second_refuses, "error: the second process finds fault"),
    ("--shard", second_is_killed, "error: another process of this run is gone"),
])
def test_an_error_ends_both_with_one_line(words, tmp_path, flags, sabotage, message):
    statuses = two("train_sft", f"{words['train_sft']} {flags}", tmp_path / "run", sabotage)
    assert statuses == [2, -signal.SIGKILL if sabotage is second_is_killed else 2]
    assert said(tmp_path / "run") == message + "\n"
    assert not (tmp_path / "run" / "model").exists()


def second_reads_other_rows(script, rank):
    if rank == 1:
        script.fingerprint = lambda config, **more: "of other rows"


def second_has_no_checkpoint(script, rank):
    if rank == 1:
        script.resume_point = lambda config, mark: None


@pytest.mark.parametrize("name, flags, sabotage", [("train_sft", "", second_reads_other_rows),
                                                   ("train_rl", "", second_reads_other_rows),
                                                   ("train_rl", " --resume", second_has_no_checkpoint)])
def test_processes_that_see_other_files_do_not_begin(words, alone, tmp_path, name, flags, sabotage):
    out = tmp_path / "run"
    if flags:
        shutil.copytree(alone[name], out)
        shutil.rmtree(out / "model")
    assert two(name, words[name] + flags, out, sabotage) == [2, 2]
    assert said(out) == f"error: {out}: settings, data, model or checkpoints are not the same for all processes\n"
    assert not (out / "model").exists()


def test_a_killed_process_ends_the_other_and_the_run_is_resumed(words, alone, tmp_path):
    assert two("train_rl", words["train_rl"], tmp_path / "run", second_is_killed) == [2, -signal.SIGKILL]
    assert two("train_rl", f"{words['train_rl']} --resume", tmp_path / "run") == [0, 0]
    assert_same_run(tmp_path / "run", alone["train_rl"])


@pytest.mark.parametrize("whom", [(0, 1), (1,)])
def test_ctrl_c(words, tmp_path, whom):
    statuses = two("train_sft", f"{words['train_sft']} --epochs 1000", tmp_path / "run", interrupt=whom)
    assert sorted(statuses) == [2, 130]
    assert said(tmp_path / "run") == "interrupted: what was already written is whole\n"
    assert checkpoint.latest(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("name, flag", [("train_sft", "--no-shard"), ("train_rl", "--shard")])
def test_a_loss_that_is_not_finite_is_kept_before_any_process_ends(words, tmp_path, name, flag):
    out = tmp_path / "run"
    statuses = two(name, f"{words[name]} {flag}", out, second_has_no_finite_loss, patience=0)
    assert 2 in statuses and re.match("error: step 1: the (loss|gradient norm) is nan; .*\n$", said(out))
    if name == "train_sft":
        assert len(read_jsonl(out / "failed_step_0001.jsonl")) == 5
    else:
        model, batches, step = replay.load_failure(out / "failed_step_0001.safetensors", torch.device("cpu"))
        assert sum(len(batch.answers) for batch in batches) == step.normalizer == 12
        assert sum(int(batch.trained.sum()) for batch in batches) == step.tokens
        start = checkpoint.load(words[name].split()[1]).state_dict()
        assert all(torch.equal(tensor, start[key]) for key, tensor in model.state_dict().items())


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(InputError, match="device 'cuda:99'"):
        pick_device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    with pytest.raises(InputError, match="device 'cuda:1': each of several processes"):
        pick_device("cuda:1")


# ---- torchrun itself


NO_THREAD_OUTLIVES_PYTHON = """
import atexit, os
from pathlib import Path
threads = lambda: [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: any("gloo" in name for name in threads()) and os._exit(7))
"""


def torchrun(words: str, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "sitecustomize.py").write_text(NO_THREAD_OUTLIVES_PYTHON)  # it might abort the process
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_sft.py",
               *words.split(), "--out", str(tmp_path / "run")]
    paths = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    root = Path(train_sft.__file__).parent
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=DEADLINE)


def test_torchrun(words, alone, tmp_path):
    done = torchrun(words["train_sft"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step ") == len(metrics(tmp_path / "run")) and done.stdout.endswith("model: written\n")
    assert_same_run(tmp_path / "run", alone["train_sft"])


@pytest.mark.parametrize("flag, shown", [("--help", "--learning-rate"), ("--lr 3", "unrecognized arguments: --lr 3")])
def test_torchrun_with_an_early_end(words, tmp_path, flag, shown):
    done = torchrun(f"{words['train_sft']} {flag}", tmp_path)
    assert done.returncode == (flag != "--help") and shown in done.stdout + done.stderr
    assert not re.search(r"exitcode\s*: +(7|-6)", done.stderr), done.stderr
