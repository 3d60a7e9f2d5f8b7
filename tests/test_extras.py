"""The second command of the README runs with the extra `dev` alone: what another extra brings is asked for, not taken for granted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.test_house import ROOT, canonical, relative, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def modules(requirements: list[str]) -> set[str]:
    """What `import` calls them: of all of these, the distribution's own name."""
    return {canonical(re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).replace("-", "_") for requirement in requirements}


ABSENT = modules([*EXTRAS["hf"], *EXTRAS["onnx"], *EXTRAS["views"]]) - modules([*PROJECT["dependencies"], *EXTRAS["dev"]])
WORDS = "|".join(sorted(ABSENT))
CONCERNED = [path for path in sources("tests") if re.search(rf'(from|import|importorskip\() *"?({WORDS})\b', path.read_text())]

# Hidden from `import` and from `find_spec` alike, as if they had not been installed.
HIDDEN = f"""
import importlib.machinery as machinery

found = machinery.PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {sorted(ABSENT)} else found(name, path, target)

machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def test_there_is_something_to_look_at():
    assert {"onnxruntime", "transformers", "datasets", "wandb_workspaces"} <= ABSENT and len(CONCERNED) > 5


@pytest.mark.parametrize("path", CONCERNED, ids=relative)
def test_a_package_of_another_extra_is_asked_for_before_it_is_imported(path):
    text = path.read_text()
    for found in re.finditer(rf"^\s*(?:from|import) ({WORDS})\b", text, re.MULTILINE):
        asked = re.search(rf'importorskip\(\s*"{found[1]}\b', text[: found.start()])
        assert asked, f"{relative(path)} imports {found[1]} and does not skip without it"


def test_without_the_other_extras_every_test_is_found_and_those_of_exported_files_pass(tmp_path):
    """Found, as a package that is missing at the top of a module fails there; and run, where one format of several needs an extra."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-q",
        "-p",
        "no:cacheprovider",
        *map(str, CONCERNED),
        "-k",
        "test_export and batchnorm and knows and not card",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "needs the extra onnx: pip install -e '.[onnx]'" in done.stdout and "1 passed" in done.stdout
