"""The rules of the house that a machine can check: who imports whom, what imports torch, how long things are, what must not be in a file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = tuple(
    set(layer.split())
    for layer in (
        "errors",
        "config random schedule task files surroundings identity resample compiling pretrained probe lr_curve small_resnet dinov2 dilation backends",
        "lock rundir environment vote watchdog rendezvous distributed signals log data augmentation_rules validation cautions",
        "checkpoint ema adamw optim models pyramid mit fusion update state evaluation weights inference debug parts labels",
        "engine",
        "build feeds stages lr_finder batch_finder recorder run evaluate export knn",
        "sweep",
        "launch __main__",
    )
)
"""trainer/ from the bottom up. A module imports from its own layer and those below; packages count as a whole."""

TORCH_FREE = (
    "launch", "tasks", "trainer", "trainer.config", "trainer.errors", "trainer.schedule", "trainer.rundir", "trainer.signals", "trainer.files",
    "trainer.log", "trainer.validation", "trainer.launch.door", "trainer.launch.dispatch", "trainer.launch.help", "trainer.data.config",
    "trainer.data.source", "trainer.data.order", "trainer.data.index", "trainer.__main__", "trainer.sweep.manifest",
    "trainer.sweep.status", "trainer.sweep.report", "trainer.sweep.diff", "trainer.sweep.reproduce", "trainer.sweep.sync",
    "trainer.launch.search", "trainer.launch.search_plan", "trainer.launch.evaluate", "trainer.launch.predict", "trainer.launch.export", "trainer.launch.extend", "trainer.launch.clean",
)  # fmt: skip
"""What is imported before a run starts: composing, checking and submitting 500 jobs must not wait for torch."""

HYDRA_FREE = ("tasks", "trainer.__main__", "trainer.sweep.status", "trainer.sweep.report", "trainer.sweep.diff", "trainer.launch.clean")
"""Of those, what only reads what runs left: importing Hydra takes longer than reading a sweep."""

LINES_OF_FILE, LINES_OF_FUNCTION = 300, 40

LONG_FILES: dict[str, str] = {
    "trainer/engine.py": "the loop, and what it counts between two log points: to be read from top to bottom, in one place",
}
"""Files that are longer, and the reason why they are better in one piece."""

LONG_FUNCTIONS: dict[str, str] = {
    "trainer/run.py:_train": "a run from its beginning to its end, every part named once, in the order of events",
}
"""`file:function`, likewise."""

NOT_IN_A_FILE = {
    "a path of somebody's machine": r"(?<![\w.])/(?:home|Users|root|work|mnt/data)/[\w.-]+/",
    "a package index": r"\b(?:files\.)?py(?:thonhosted|pi)\.org\b|registry\.npmjs\b|\bdownload\.pytorch\.org\b",
    "an address beside a pin": r"^[\w.\[\]-]+ @ (?:file|https?):",
}


def tracked() -> list[Path]:
    """Every file of the project: git's list, or all files where there is no git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        ignored = {".git", ".venv", "runs", "__pycache__"}
        return [p for p in ROOT.rglob("*") if p.is_file() and not ignored & set(p.relative_to(ROOT).parts)]


def sources(*folders: str) -> list[Path]:
    return sorted(p for p in tracked() if p.suffix == ".py" and (not folders or p.relative_to(ROOT).parts[0] in folders))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(path: Path) -> str:
    """The module or package directly in trainer/ that `path` belongs to."""
    return [*module_name(path).split("."), "__init__"][1]


def imports(path: Path) -> Iterator[str]:
    """The modules that are imported when `path` is: not those inside functions, nor for the type checker alone."""
    pending: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while pending:
        statement = pending.pop()
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0 and statement.module, f"{relative(path)}: imports are absolute here"
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            pending += statement.orelse
        else:
            pending += [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)] * (
                not isinstance(statement, ast.FunctionDef | ast.ClassDef)
            )


def layer(part: str) -> int:
    return next((i for i, parts in enumerate(LAYERS) if part in parts), -1)


def test_every_part_of_trainer_has_a_layer():
    parts = {p.relative_to(ROOT / "trainer").parts[0].removesuffix(".py") for p in sources("trainer")} - {"__init__"}
    assert parts - set().union(*LAYERS) == set(), "say in LAYERS where these belong"
    assert set().union(*LAYERS) - parts == set(), "these are gone"


@pytest.mark.parametrize("path", sources("trainer"), ids=relative)
def test_imports_go_down(path: Path):
    here = part_of(path)
    for imported in imports(path):
        package, _, rest = imported.partition(".")
        assert package != "tasks" or here == "__main__", f"{relative(path)} imports {imported}: the engine knows no task"
        if package == "trainer" and rest:
            part = rest.split(".")[0]
            assert layer(part) <= layer(here) or layer(part) < 0, f"{relative(path)} imports {imported}, from a layer above its own"


def test_no_circles():
    """Also within a layer."""
    arrows: dict[str, set[str]] = {}
    for path in sources("trainer"):
        here = part_of(path)
        parts = {i.split(".")[1] for i in imports(path) if i.startswith("trainer.")}
        arrows.setdefault(here, set()).update(parts - {here})
    while free := {part for part, below in arrows.items() if not below & set(arrows)}:
        arrows = {part: below for part, below in arrows.items() if part not in free}
    assert not arrows, f"these import one another: {arrows}"


@pytest.mark.parametrize("path", sources("tasks"), ids=relative)
def test_tasks_stand_alone(path: Path):
    task = path.relative_to(ROOT / "tasks").parts[0]
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] == "trainer" and len(parts) > 1 and layer(parts[1]) >= 0:
            assert layer(parts[1]) < layer("engine"), (
                f"{relative(path)} imports {imported}: the engine calls tasks, not the other way round"
            )
        if parts[0] == "tasks" and len(parts) > 1:
            assert parts[1] == task, f"{relative(path)} imports another task, {imported}"


HEAVY = ("torch", "torchvision", "timm", "matplotlib", "wandb", "sklearn", "webdataset", "rich")


@pytest.mark.parametrize(("modules", "heavy"), [(TORCH_FREE, HEAVY), (HYDRA_FREE, ("hydra", "omegaconf"))], ids=["torch", "hydra"])
def test_nothing_is_imported_that_is_not_needed_yet(modules, heavy):
    script = f"import sys, importlib\nfor name in {modules!r}:\n    importlib.import_module(name)\n    print(name, *(m for m in {heavy!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    guilty = [line for line in done.stdout.splitlines() if len(line.split()) > 1]
    assert not guilty, f"the first line names who imports what: {guilty[:3]}"


def test_trainer_names_no_task():
    tasks = {p.relative_to(ROOT / "tasks").parts[0] for p in sources("tasks")} - {"__init__.py"}
    # Short names only as whole words; the English words are allowed in prose, but not as a value that code compares with.
    name = re.compile(r"\b(" + "|".join(sorted(tasks)) + r")\b")
    for path in sources("trainer"):
        tree = ast.parse(path.read_text())
        compared = [part for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)]
        values = [node.value for node in compared if isinstance(node, ast.Constant)]
        assert not [v for v in values if isinstance(v, str) and name.fullmatch(v)], f"{relative(path)} asks which task this is"
        named = [
            n.id if isinstance(n, ast.Name) else n.name for n in ast.walk(tree) if isinstance(n, ast.Name | ast.FunctionDef | ast.ClassDef)
        ]
        assert not [n for n in named if name.search(n)], f"{relative(path)} has something named after a task"


def spans(path: Path) -> Iterator[tuple[str, int]]:
    """Every function with its number of lines, its docstring not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield f"{relative(path)}:{node.name}", (node.end_lineno or 0) - body[0].lineno + 1


def test_files_and_functions_are_short_or_say_why():
    long_files = {
        relative(p): n for p in sources("trainer", "tasks", "benchmarks") if (n := len(p.read_text().splitlines())) > LINES_OF_FILE
    }
    assert long_files.keys() <= LONG_FILES.keys(), f"split {long_files}, or argue in LONG_FILES"
    functions = [span for p in sources("trainer", "tasks", "benchmarks") for span in spans(p)]
    long_functions = {name: n for name, n in functions if n > LINES_OF_FUNCTION}
    assert long_functions.keys() <= LONG_FUNCTIONS.keys(), f"split {long_functions}, or argue in LONG_FUNCTIONS"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_modules_say_what_they_are_for(path: Path):
    text = path.read_text()
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, "a name that says nothing: name it after what it knows"
    assert not text or ast.get_docstring(ast.parse(text)), "the first line says what this module is for"


def test_nothing_of_one_machine_in_any_file():
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        for what, pattern in NOT_IN_A_FILE.items():
            found = re.search(pattern, text, re.MULTILINE)
            assert not found or path == Path(__file__), f"{relative(path)} holds {what}: {found and found.group()}"


def test_the_readme_and_ci_run_the_same_two_commands():
    first, second = re.findall(r"```(?:bash|sh|console)?\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[0].splitlines()[:2]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert first in script
    assert second in script


def test_every_dependency_is_pinned_without_an_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {canonical(re.split(r"[\[<>=!~; ]", d, maxsplit=1)[0]) for d in wanted}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_]+", line) for line in lines)
    assert names <= {canonical(line.split("==")[0]) for line in lines}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_test_is_skipped_for_what_can_be_installed():
    """`importorskip` is for packages outside of every extra: what CI installs, CI tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {
        canonical(re.split(r"[\[<>=!~; ]", d, maxsplit=1)[0]) for d in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    for path in sources("tests"):
        for name in re.findall(r"importorskip\(\s*[\"']([\w.]+)", path.read_text()):
            assert canonical(name.split(".")[0]) not in installed, f"{relative(path)} would skip without {name}, which is always there"
