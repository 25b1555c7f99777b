"""What README.md, docs/manual.md and docs/lesson.md say of the program: commands that it takes, names it has, files that exist."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

from minibridge import arms, igsm, splits
from minibridge.config import run_main, write_jsonl
from test_layers import MODULES, PACKAGE, imports

ROOT = Path(__file__).parent.parent
TEXTS = {path.name: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "docs" / "manual.md", ROOT / "docs" / "lesson.md") if path.exists()}
ENDINGS = {"py", "safetensors", "png"}  # of files that are called as a module is
pytestmark = pytest.mark.skipif(len(TEXTS) < 3, reason="the documents are not installed with the package")


def commands() -> list[str]:
    """Of all fenced blocks the lines that run a script or a module of this project."""
    lines = [line.split("&&")[-1].strip() for text in TEXTS.values() for block in text.split("```sh\n")[1:]
             for line in block.split("```")[0].splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun --nproc-per-node \d+) (-m minibridge|\w+\.py)", line)]


@pytest.mark.parametrize("command", commands())
def test_a_command_has_the_options_that_it_is_given(command, capsys):
    words = shlex.split(command, comments=True)
    first = next(n for n, word in enumerate(words) if word.startswith("minibridge.") or word.endswith(".py"))
    module, options = importlib.import_module(words[first].removesuffix(".py")), words[first + 1 :]
    config = module.COMMANDS[options.pop(0)][1] if hasattr(module, "COMMANDS") else module.Config
    assert run_main(lambda config: None, config, options) == 0, capsys.readouterr().err


def test_code_in_the_manual_runs(tmp_path, monkeypatch):
    """From the root, after the first command of the README."""
    toy = tmp_path / "runs" / "toy" / "seed_0"
    write_jsonl(toy / "rl.jsonl", [arms.record(problem, 0) for problem in splits.problems("rl", 2, (4, 4), igsm.TOY, 0)])
    for name in ("docs", "minibridge"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    verified, library = ({} for _ in range(2))
    for block, names in zip(TEXTS["manual.md"].split("```python\n")[1:], (verified, library), strict=True):
        exec(block.split("```")[0], names)
    assert verified["verdict"].first_wrong_step == 1
    assert library["logits"].shape[2] == library["model"].config.vocab_size
    assert library["model"].lm_head_weight.grad.isfinite().all()


@pytest.mark.parametrize("name", TEXTS)
def test_a_name_in_the_text_is_one_in_the_code(name):
    """`module.name`, be it of a function, a class or a constant."""
    named = [pair for pair in re.findall(r"`(\w+)\.(\w+)`", TEXTS[name]) if pair[0] in MODULES and pair[1] not in ENDINGS]
    wrong = [pair for pair in named if not hasattr(importlib.import_module(f"minibridge.{pair[0]}"), pair[1])]
    assert not wrong


@pytest.mark.parametrize("name", TEXTS)
def test_a_link_leads_to_a_file_and_a_heading(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        target = folder / (path or name)
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_the_reading_order_names_every_module_before_those_that_import_it():
    part = TEXTS["README.md"].split("## To learn from it")[1].split("Each equation")[0]
    files = {path.stem: path for path in (*PACKAGE.glob("[!_]*.py"), *ROOT.glob("*.py"))}
    order = re.findall(r"`(\w+)\.py`", part)
    assert sorted(order) == sorted(files)
    for place, name in enumerate(order):
        ours = {imported.removeprefix("minibridge.") for imported in imports(files[name])} & set(files)
        assert ours <= set(order[:place]), name
