import json
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

import minibridge.run_folder
from minibridge.config import REQUIRED, InputError, option, parse, read_json, read_jsonl, run_main, write_jsonl
from minibridge.run_folder import Run


@dataclass(frozen=True)
class Config:
    data: str = option(REQUIRED, "100% of the file")
    ops: tuple[int, int] = option((15, 20), "operations of a problem")
    learning_rate: float = option(1e-6, "AdamW learning rate")
    mask_prompt: bool = option(True, "train on completions only")
    bf16: bool = option(False, "half precision")
    mode: Literal["fast", "slow"] = option("fast", "how")
    level: Literal[1, 2] | None = option(None, "how much")
    limit: int | None = option(3, "at most")
    device: Literal["cpu", "cuda"] = option("cpu", "where")
    out: str = option("runs/x", "run folder")
    kl_threshold: float | None = None


def one_line_error(capsys, *argv, main=lambda config: None):
    assert run_main(main, Config, argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


# ---- command line


def test_defaults_are_the_dataclass_defaults():
    assert parse(Config, ["--data", "x"]) == Config(data="x")


def test_every_type_is_read():
    words = ("--data a --ops 7-9 --learning-rate 3e-4 --no-mask-prompt --bf16 --mode slow --level 2 "
             "--limit none --device cuda --out y --kl-threshold 0.15")
    config = parse(Config, words.split())
    assert config == Config("a", (7, 9), 3e-4, False, True, "slow", 2, None, "cuda", "y", 0.15)
    assert isinstance(config.level, int)
    with pytest.raises(FrozenInstanceError):
        config.data = "b"


def test_a_single_number_is_a_range():
    assert parse(Config, ["--data", "x", "--ops", "20"]).ops == (20, 20)


@pytest.mark.parametrize("word", ["20-15", "a-b", "1-", "1-2-3", "-5", "1.5", "9" * 5000])
def test_bad_range_names_the_flag(capsys, word):
    error = one_line_error(capsys, "--data", "x", f"--ops={word}")
    assert "--ops" in error and len(error) < 200


@pytest.mark.parametrize("value, reason", [("", "empty"), ("caf\udce9", "not UTF-8")])
def test_a_text_that_is_none_is_refused(capsys, value, reason):
    assert reason in one_line_error(capsys, "--data", value)


def test_a_console_of_few_characters_shows_escapes():
    code = "from minibridge.config import run_main; from tests.test_config import Config; " \
           "run_main(lambda config: print('caf\u00e9'), Config, ['--data', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": "ascii"}, text=True,
                          capture_output=True)
    assert done.stdout == "caf\\xe9\n", done.stderr


def test_empty_range_says_why(capsys):
    error = one_line_error(capsys, "--data", "x", "--ops", "20-15")
    assert "--ops: the range 20-15 is empty: 20 is larger than 15" in error


@pytest.mark.parametrize("argv, named", [
    (["--data", "x", "--nonsense", "1"], "--nonsense"),
    ([], "--data"),
    (["--data", "x", "--learning-rate", "fast"], "--learning-rate: invalid float value: 'fast'"),
    (["--data", "x", "--limit", "1.5"], "--limit: invalid int value: '1.5'"),
    (["--data", "x", "--mode", "quick"], "--mode"),
    (["--data", "x", "--device", "tpu"], "--device"),
    (["--data", "x", "--learn", "1"], "--learn"),  # no abbreviations: a new flag could break them
])
def test_bad_argument_is_one_line_and_status_2(capsys, argv, named):
    assert named in one_line_error(capsys, *argv)


def test_help_shows_text_default_and_module_docstring(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "What this script is for.")
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        run_main(lambda config: None, Config, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in ["What this script is for.", "100% of the file (required)", "--ops OPS", "(default: 15-20)",
                 "AdamW learning rate (default: 1e-06)", "--no-mask-prompt", "(default: True)", "{fast,slow}",
                 "{1,2,none}", "(default: none)"]:
        assert text in shown, text


def test_unsupported_type_is_the_programmers_error():
    @dataclass(frozen=True)
    class Odd:
        sizes: list[int] = option((), "not supported")

    with pytest.raises(TypeError):
        parse(Odd, [])


# ---- run_main


def test_main_gets_the_config_and_success_is_0():
    seen = []
    assert run_main(seen.append, Config, ["--data", "x"]) == 0
    assert seen == [Config(data="x")]


def test_input_error_is_one_line(capsys):
    def main(config):
        raise InputError("problems.jsonl:3: no answer")

    assert one_line_error(capsys, "--data", "x", main=main) == "error: problems.jsonl:3: no answer\n"


def test_a_long_message_keeps_its_beginning_and_its_end(capsys):
    def main(config: Config):
        raise InputError("begins " + "x" * 5000 + " and ends")

    error = one_line_error(capsys, "--data", "x", main=main)
    assert error.startswith("error: begins xx") and error.endswith("xx and ends\n") and 400 < len(error) <= 501


def test_interruption_is_130_and_says_that_files_are_whole(capsys):
    def main(config):
        raise KeyboardInterrupt

    assert run_main(main, Config, ["--data", "x"]) == 130
    error = capsys.readouterr().err
    assert "is whole" in error and error.count("\n") == 1


def test_os_errors_name_the_file(capsys, tmp_path):
    missing = tmp_path / "absent" / "file"
    error = one_line_error(capsys, "--data", "x", main=lambda config: open(missing))
    assert str(missing) in error and "No such file" in error
    def disk_full(config):
        raise OSError(28, "No space left on device")  # what write() raises: no filename

    assert one_line_error(capsys, "--data", "x", main=disk_full) == "error: No space left on device\n"


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda config: 1 / 0, Config, ["--data", "x"])


# ---- JSON lines


def test_jsonl_round_trip_keeps_text_as_it_is(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows = [{"text": "x²\u2028 ≤ 3\r\n\x85"}, {"n": 1, "deep": {"list": [1.5, None, True]}}]
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows  # U+2028, U+0085 and \r must not end a line
    assert path.read_bytes().count(b"\n") == 2 and "x²".encode() in path.read_bytes()


def test_non_finite_numbers_become_null(tmp_path):
    write_jsonl(tmp_path / "rows", [{"a": [float("nan"), float("-inf"), 1.0]}])
    assert read_jsonl(tmp_path / "rows") == [{"a": [None, None, 1.0]}]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, rows())
    assert read_jsonl(path) == [{"a": 1}]
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert read_jsonl(path) == [{"a": 1}]


def test_a_kill_during_the_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, [{"a": 2}])
    assert read_jsonl(path) == [{"a": 1}]


@pytest.mark.parametrize("content, line, reason", [
    (b'{"a": 1}\n{"a": \n', 2, "not valid JSON"),
    (b'{"a": 1}\n\n{"a": 2}\n', 2, "blank line"),
    (b'{"a": 1}\n\n', 2, "blank line"),
    (b'{"a": 1}\n{"a": 2}\n[3]\n', 3, "not a JSON object but list"),
    (b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8"),
    (b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n', 2, "half of a surrogate pair"),
    (b'{"a": "\\\\ud83d"}\n{"\\udc00": 1}\n', 2, "half of a surrogate pair"),
    (b'{"a": 1}\n{"a": [NaN]}\n', 2, "not readable JSON: .*NaN"),
    (b'{"a": -1e999}\n', 1, "not readable JSON: -1e999 is beyond"),
    (b'{"a": -Infinity}\n', 1, "not readable JSON: .*Infinity"),
    (b'{"a": {"b": 1}, "b": 2}\n{"a": {"b": 1, "b": 1}}\n', 2, "not readable JSON: a name stands twice"),
    (b'{"a": ' + b"9" * 5000 + b"}\n", 1, "not readable JSON: .*digits"),
    (b'{"a": ' + b"[" * 99 + b"]" * 99 + b'}\n{"a": ' + b"[" * 100 + b"]" * 100 + b"}\n", 2, "not readable JSON: nested"),
    (b'{"a": ' + b'{"a": ' * 100 + b"1" + b"}" * 101 + b"\n", 1, "not readable JSON: nested"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 1, "not readable JSON: "),
])
def test_bad_line_is_named(tmp_path, content, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_jsonl(path)
    assert re.match(re.escape(f"{path}:{line}: ") + reason, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, reason", [
    (b'{"a":\n  1,\n  2}', "not valid JSON: .* at line 3, column 3"), (b"", "empty file"), (b"[]", "not a JSON object"),
    (b"\xef\xbb\xbf{}", "not valid JSON: .*BOM"), (None, "No such file"), ("folder", "Is a directory")])
def test_bad_json_file_is_named(tmp_path, content, reason):
    path = tmp_path / "a.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: ") + reason):
        read_json(path)
    path = tmp_path / "b.json"
    path.write_text('{\n"a": "\\ud83d\\ude00"}\n')
    assert read_json(path) == {"a": "\U0001f600"}


@pytest.mark.parametrize("newline, end", [("\n", "\n"), ("\n", ""), ("\r\n", "\r\n")])
def test_last_newline_and_windows_newlines_do_not_matter(tmp_path, newline, end):
    (tmp_path / "rows").write_bytes(f'{{"a": 1}}{newline}{{"a": 2}}{end}'.encode())
    assert read_jsonl(tmp_path / "rows") == [{"a": 1}, {"a": 2}]


def test_missing_file_and_folder_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="absent.jsonl: No such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="directory"):
        read_jsonl(tmp_path)


# ---- run folder


def test_of_two_processes_in_one_folder_the_earlier_ends(tmp_path, monkeypatch):
    first = Run(tmp_path, Config(data="x"), "cpu")
    first.log(1, loss=1.0)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    second = Run(tmp_path, Config(data="x"), "cpu", resume_step=2)
    second.log(2, loss=0.5)
    for write in (lambda: first.log(2, loss=0.7), first.finish):
        with pytest.raises(InputError, match="another process has begun a run here"):
            write()
    second.finish()
    assert [line["loss"] for line in read_jsonl(second.metrics)] == [1.0, 0.5]


def test_run_json_is_the_record_of_the_run(tmp_path, monkeypatch):
    config = Config(data="x")
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "x"])
    run = Run(tmp_path / "a" / "b", config, device="cuda:0")
    record = json.loads((run.path / "run.json").read_text())
    assert record["config"] == asdict(config) | {"ops": [15, 20], "out": "runs/x"}
    assert record["argv"] == ["train.py", "--data", "x"] and record["device"] == "cuda:0"
    assert set(record["versions"]) >= {"python", "torch", "numpy"} and record["started"].startswith("20")
    assert "seconds" not in record
    run.finish(accuracy=0.5)
    after = json.loads((run.path / "run.json").read_text())
    assert after.pop("seconds") >= 0 and after.pop("accuracy") == 0.5 and after == record
    assert {path.name for path in run.path.iterdir()} == {"run.json", "metrics.jsonl"}


def test_commit_is_recorded_in_a_work_tree_only(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "run_folder.py").write_text("a = 1\n")
    monkeypatch.setattr(minibridge.run_folder, "__file__", str(package / "run_folder.py"))
    assert "commit" not in Run(tmp_path / "run", Config(data="x"), "cpu").record

    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *settings, *arguments]
        return subprocess.run(command, cwd=package, check=True, capture_output=True, text=True)

    git("init", "-q")
    git("commit", "-q", "-m", "of someone else", "--allow-empty")
    assert "commit" not in Run(tmp_path / "run", Config(data="x"), "cpu").record  # in a repository, not of it
    git("add", "run_folder.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert Run(tmp_path / "run", Config(data="x"), "cpu").record["commit"] == commit
    (package / "run_folder.py").write_text("a = 2\n")
    assert Run(tmp_path / "run", Config(data="x"), "cpu").record["commit"] == commit + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert "commit" not in Run(tmp_path / "run", Config(data="x"), "cpu").record


def test_log_writes_valid_json_and_prints_one_aligned_line(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    run = Run(tmp_path, Config(data="x"), "cpu", steps=200)
    run.log(9, loss=torch.tensor(0.123456), accuracy=1, kl=float("nan"))
    run.log(12, loss=1.23456e-06, accuracy=12345678, kl=float("inf"))
    assert capsys.readouterr().out.splitlines() == [
        "step   9/200 | loss 0.1235    | accuracy 1         | kl nan",
        "step  12/200 | loss 1.235e-06 | accuracy 12345678  | kl inf"]
    first, second = read_jsonl(run.metrics)
    assert first == {"step": 9, "loss": pytest.approx(0.123456), "accuracy": 1, "kl": None}
    assert second["kl"] is None and second["accuracy"] == 12345678


def test_console_shows_the_numbers_asked_for(tmp_path, capsys):
    run = Run(tmp_path, Config(data="x"), "cpu")
    run.log(1, console=("accuracy", "absent"), loss=1.0, accuracy=0.25)
    run.log(2, console=(), loss=1.0)
    assert capsys.readouterr().out == "step     1 | accuracy 0.25\n"
    assert [row["loss"] for row in read_jsonl(run.metrics)] == [1.0, 1.0]


def test_resume_repeats_no_step_and_loses_none(tmp_path):
    run = Run(tmp_path, Config(data="x"), "cpu")
    for step in [1, 2, 2, 3, 4]:
        run.log(step, console=(), old=step)
    with open(run.metrics, "a") as file:
        file.write('{"step": 5, "ol')  # killed while appending
    resumed = Run(tmp_path, Config(data="x"), "cpu", resume_step=3)
    resumed.log(3, console=(), new=3)
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 2, 3]
    assert read_jsonl(run.metrics)[-1] == {"step": 3, "new": 3}
    assert resumed.record["resume_step"] == 3


@pytest.mark.parametrize("second, reason", [("", "blank line"), ('{"loss": 1}', "has no step"), ("[]", "not a JSON object")])
def test_a_damaged_line_of_metrics_is_named(tmp_path, second, reason):
    Run(tmp_path, Config(data="x"), "cpu").metrics.write_text(f'{{"step": 0}}\n{second}\n')
    with pytest.raises(InputError, match=f"metrics.jsonl:2: {reason}"):
        Run(tmp_path, Config(data="x"), "cpu", resume_step=3)


def test_metrics_that_cannot_be_read_stop_a_resumed_run(tmp_path):
    run = Run(tmp_path, Config(data="x"), "cpu")
    run.metrics.unlink()
    run.metrics.mkdir()
    with pytest.raises(InputError, match="metrics.jsonl: Is a directory"):
        Run(tmp_path, Config(data="x"), "cpu", resume_step=3)


def test_a_new_run_starts_its_metrics_afresh(tmp_path):
    Run(tmp_path, Config(data="x"), "cpu").log(1, console=(), loss=1.0)
    assert read_jsonl(Run(tmp_path, Config(data="x"), "cpu").metrics) == []
    assert read_jsonl(Run(tmp_path / "never", Config(data="x"), "cpu", resume_step=5).metrics) == []


@dataclass(frozen=True)
class Bounded:
    count: int | None = option(None, "rows", least=1)
    rate: float = option(0.5, "rate", least=0)


@pytest.mark.parametrize("words, message", [
    (["--count", "0"], "count: must be at least 1, not 0"), (["--rate", "-0.1"], "rate: must be at least 0, not -0.1"),
    (["--rate", "nan"], "rate: nan is not a finite number"), (["--rate", "inf"], "rate: inf is not a finite number")])
def test_numbers_out_of_bounds_are_named(words, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        parse(Bounded, words)
    assert parse(Bounded, ["--count", "1", "--rate", "0"]) == Bounded(1, 0.0)


def test_nothing_but_a_file_is_replaced(tmp_path):
    with pytest.raises(InputError, match="not a file"):
        write_jsonl(tmp_path, [{"a": 1}])
    assert tmp_path.is_dir()


# ---- what ends a script


@pytest.mark.parametrize("trouble", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you")])
def test_no_memory_is_one_line(capsys, trouble):
    def main(config):
        raise trouble

    assert "no memory" in one_line_error(capsys, "--data", "x", main=main)


def test_an_error_of_ours_stays_a_traceback():
    def main(config):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError):
        run_main(main, Config, ["--data", "x"])


def printing(tmp_path, lines: int, stdout) -> subprocess.Popen:
    """A script that prints so many lines, in blocks as Python does where it is no terminal, after a line to stdin."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom dataclasses import dataclass\nfrom minibridge.config import run_main\n\n\n"
                      "@dataclass(frozen=True)\nclass Config:\n    pass\n\n\n"
                      "def main(config):\n    sys.stdin.readline()\n"
                      f"    for line in range({lines}):\n        print(line)\n\n\nsys.exit(run_main(main, Config))\n")
    root = str(Path(__file__).parents[1])
    return subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, cwd=root,
                            env=os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": ""})


@pytest.mark.parametrize("lines", [3, 10**6])
def test_output_that_nobody_reads_is_no_success(tmp_path, lines):
    process = printing(tmp_path, lines, subprocess.PIPE)
    process.stdout.close()
    assert process.communicate(b"\n", 60)[1] == b"" and process.returncode == 141


def test_output_that_is_closed_from_the_start_is_no_trouble(tmp_path):
    printing(tmp_path, 3, subprocess.PIPE).communicate(b"\n", 60)  # writes the script
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(["sh", "-c", 'exec "$0" "$1" >&-', *command], input=b"\n", stderr=subprocess.PIPE, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("lines", [3, 10**6])
def test_output_to_a_full_disk_is_one_line(tmp_path, lines):
    with open("/dev/full", "wb") as full:
        process = printing(tmp_path, lines, full)
    assert process.communicate(b"\n", 60)[1] == b"error: No space left on device\n" and process.returncode == 2


def test_a_way_through_a_folder_that_is_not_there_is_no_other_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", [{"a": 1}])
    for path, fits in (("there/../rows.jsonl", False), ("../rows.jsonl", True), ("rows.jsonl", True)):
        if fits:
            assert parse(Config, ["--data", "x", "--out", path]).out == path
        else:
            assert f"out: {path}: there is no folder there" in one_line_error(capsys, "--data", "x", "--out", path)


def test_nan_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": NaN}\n')
    with pytest.raises(InputError, match="rows.jsonl:1: not readable JSON: NaN is no JSON"):
        read_jsonl(tmp_path / "rows.jsonl")
