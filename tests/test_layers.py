"""The arrows between the modules, read from their imports: what may know what."""

import ast
import functools
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minibridge"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
SCRIPTS = {path.stem for path in PACKAGE.parent.glob("*.py")} | {"gen_data", "train_sft", "train_rl"}
RUNNABLE = {"evaluate", "pretrain", "influence", "plots", "reproduce", "bench", "splits", "compare_losses", "show"}


@functools.cache
def imports(path):
    """Names imported anywhere in a file: "torch", "numpy", ...; of the package "minibridge.grpo", ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            if node.module == "minibridge":
                found |= {f"minibridge.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return {".".join(name.split(".")[:2 if name.startswith("minibridge.") else 1]) for name in found}


def siblings(module):
    """Modules of the package that `module` imports itself."""
    names = {name.removeprefix("minibridge.") for name in imports(PACKAGE / f"{module}.py")
             if name.startswith("minibridge.")}
    assert names <= set(MODULES), f"{module} imports {names - set(MODULES)}, which do not exist"
    return names


def below(module):
    """Everything that `module` reaches through modules of the package, itself included."""
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += siblings(name)
    return reached


def existing(*modules):
    return [module for module in modules if module in MODULES]


@pytest.mark.parametrize("module", existing(
    "strictjson", "config", "dag", "igsm", "arithmetic", "worlds", "custom", "traces", "arms", "splits", "answer", "formula",
    "verify", "tables"))
def test_data_generation_needs_only_the_standard_library(module):
    for name in below(module):
        outside = {root for root in imports(PACKAGE / f"{name}.py") if not root.startswith("minibridge")}
        assert outside <= set(sys.stdlib_module_names), f"{module} reaches {outside} through {name}"


def test_gen_data_never_reaches_torch():
    script = PACKAGE.parent / "gen_data.py"
    if script.exists():
        names = imports(script)
        assert "torch" not in names
        for name in names & {f"minibridge.{module}" for module in MODULES}:
            for module in below(name.removeprefix("minibridge.")):
                assert "torch" not in imports(PACKAGE / f"{module}.py"), f"gen_data reaches torch by {module}"


@pytest.mark.parametrize("module", existing("model", "grpo", "logprob", "memory"))
def test_the_model_and_the_loss_never_see_text(module):
    text = {"tokenizer", "traces", "arms", "answer", "data", "dag", "igsm", "arithmetic", "custom", "rollout", "formula",
            "verify"}
    assert not below(module) & text


@pytest.mark.parametrize("module", existing("grpo", "logprob"))
def test_the_loss_never_sees_a_model(module):
    assert below(module) <= {module, "config", "strictjson"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_script(module):
    if module not in ("pretrain", "reproduce", "bench"):  # they run and measure scripts
        assert not imports(PACKAGE / f"{module}.py") & SCRIPTS
        assert not siblings(module) & {"reproduce", "bench", "peers"}
    if module not in RUNNABLE | {"results"}:  # it scores what `evaluate` has saved
        assert not below(module) & RUNNABLE, "arrows point down only"


@pytest.mark.parametrize("module", MODULES)
def test_no_cycles(module):
    assert all(module not in below(other) for other in siblings(module))


@pytest.mark.parametrize("module", MODULES)
def test_only_known_packages_are_imported(module):
    """The dependencies of pyproject.toml at run time, and the extras only inside functions."""
    names = {name for name in imports(PACKAGE / f"{module}.py") if not name.startswith("minibridge")}
    allowed = {"torch", "numpy", "tokenizers", "safetensors"} | SCRIPTS
    extras = {"transformers", "matplotlib"} | ({"trl", "datasets"} if module == "peers" else set())
    assert names <= set(sys.stdlib_module_names) | allowed | extras
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else \
                    {node.module.split(".")[0]}
            assert not roots & extras, f"{module} cannot be imported without {roots & extras}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines < 350, f"{module}.py has {lines} lines"


@pytest.mark.parametrize("path", sorted([*PACKAGE.glob("*.py"), *PACKAGE.parent.glob("*.py")]), ids=lambda path: path.stem)
def test_lines_fit_on_a_screen(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 125, f"{path.name}:{number} has {len(line)} characters"


def test_the_package_itself_is_empty():
    assert (PACKAGE / "__init__.py").read_text() == ""
