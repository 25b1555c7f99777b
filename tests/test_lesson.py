"""Every command of docs/lesson.md, with fewer problems and steps, in the order of the lesson and from an empty folder."""
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from minibridge import evaluate, influence, plots, reproduce
from minibridge.config import read_jsonl, run_main

LESSON = Path(__file__).parent.parent / "docs" / "lesson.md"
FEW = {"reproduce": "--workers 1 --sft-rows 32 --rl-steps 1 --rl-prompts 8 --rl-samples 2 --test-problems 2",
       "influence": "--prompts 2 --val-prompts 6 --samples 8", "evaluate": "", "plots": ""}


def commands() -> list[str]:
    blocks = LESSON.read_text(encoding="utf-8").split("```sh\n")[1:]
    return [line for block in blocks for line in block.split("```")[0].splitlines()]


@pytest.mark.plot
@pytest.mark.skipif(not LESSON.exists(), reason="the documents are not installed with the package")
def test_the_lesson(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    said: list[bytes] = []
    mains = {"influence": influence, "evaluate": evaluate, "plots": plots}
    for command in commands():
        words = shlex.split(command)
        if words[0] == "sed":
            said.append(subprocess.run(words, capture_output=True, check=True).stdout)
            continue
        module = words[2].removeprefix("minibridge.")
        words = words[3:] + FEW[module].split()
        if module == "reproduce":
            assert run_main(*reproduce.COMMANDS[words[0]], words[1:]) == 0
        else:
            assert run_main(mains[module].main, mains[module].Config, words) == 0, capsys.readouterr().err
    vanilla, other = (json.loads(line) for line in said)
    assert vanilla["problem"] == other["problem"] and len(str(vanilla["messages"])) < len(str(other["messages"]))
    folder = tmp_path / "runs" / "lesson"
    assert (folder / "table.md").read_text().count("| analysis |") == 8
    assert {path.name for path in (tmp_path / "runs" / "lesson_figures").glob("*.png")} == {
        f"{name}.png" for name in ("training", "rollout_accuracy", "influence", "ablation", "fluency")}
    assert read_jsonl(folder / "seed_0" / "rl.jsonl")
