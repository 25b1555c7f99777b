"""Every command of docs/lesson.md, with fewer problems and steps, in the order of the lesson and from an empty folder."""
import shlex
from pathlib import Path

import pytest

from minibridge import evaluate, influence, plots, reproduce, show
from minibridge.config import read_jsonl, run_main

LESSON = Path(__file__).parent.parent / "docs" / "lesson.md"
FEW = {"reproduce": "--workers 1 --sft-rows 32 --rl-steps 1 --rl-prompts 8 --rl-samples 2 --test-problems 4",
       "influence": "--prompts 2 --val-prompts 6 --samples 8", "evaluate": "", "plots": "", "show": ""}


def commands() -> list[str]:
    blocks = LESSON.read_text(encoding="utf-8").split("```sh\n")[1:]
    return [line for block in blocks for line in block.split("```")[0].splitlines()]


@pytest.mark.plot
@pytest.mark.skipif(not LESSON.exists(), reason="the documents are not installed with the package")
def test_the_lesson(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    said = []
    mains = {"influence": influence, "evaluate": evaluate, "plots": plots, "show": show}
    for command in commands():
        words = shlex.split(command)
        module = words[2].removeprefix("minibridge.")
        words = words[3:] + FEW[module].split()
        if module == "reproduce":
            assert run_main(*reproduce.COMMANDS[words[0]], words[1:]) == 0
        else:
            capsys.readouterr()
            assert run_main(mains[module].main, mains[module].Config, words) == 0, capsys.readouterr().err
            said += [capsys.readouterr().out] * (module == "show")
    vanilla, other = said[0].split("=== ")[1:]
    assert "asked" in vanilla and "asked" not in other  # one problem, whose graph stands once
    assert "failed attempt" in other and "failed attempt" not in vanilla
    folder = tmp_path / "runs" / "lesson"
    assert (folder / "table.md").read_text().count("| analysis |") == 8
    assert {path.name for path in (tmp_path / "runs" / "lesson_figures").glob("*.png")} == {
        f"{name}.png" for name in ("training", "rollout_accuracy", "influence", "accuracy", "gains", "fluency")}
    assert read_jsonl(folder / "seed_0" / "rl.jsonl")
