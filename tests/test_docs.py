"""What the documents tell people to type works: every command composes, every verb exists, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trainer.__main__ import VERBS
from trainer.launch.compose import checked, compose

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ELSEWHERE = ("dataset.path", "dataset.val_path", "init_from")  # what lies on the reader's disk and not on ours
OVERRIDE_VERBS = ("validate", "plot-lr", "show-batch", "bench-loader", "describe-data")


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line in a fenced block that starts one of our programs."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"^ *```(?:bash|console|sh)?\n(.*?)^ *```", document.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if re.search(r"(^|\s|/)(launch\.py|python -m trainer)\b", line):
                    found += [(document.name, part.strip()) for part in line.split("&&") if "launch.py" in part or "-m trainer" in part]
    return found


def test_documents_have_commands():
    assert len(commands()) > 30
    assert {"README.md", "configuration.md", "data.md", "resuming.md"} <= {document for document, _ in commands()}


def is_meant_to_fail(document: str, command: str) -> bool:
    text = (ROOT / document if (ROOT / document).exists() else ROOT / "docs" / document).read_text()
    return f"$ {command}" in text and "problems with this configuration" in text.split(f"$ {command}", 1)[1][:200]


@pytest.mark.parametrize(("document", "command"), commands())
def test_command(document, command, tmp_path):
    words = shlex.split(command, comments=True)
    overrides, config_dir = [w for w in words if "=" in w and not w.startswith("-")], None
    if "trainer" in words:
        verb = words[words.index("trainer") + 1]
        assert verb in VERBS or verb.startswith("<"), f"{document}: no verb {verb}"
        if verb not in OVERRIDE_VERBS:
            return
    if "--config-dir" in words:
        config_dir = str(tmp_path)
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nloop: {epochs: 3}\n")
    overrides = [o.split(",")[0] if "-m" in words and "=" in o and "[" not in o else o for o in overrides]
    _, problems = checked(compose(overrides, config_dir))
    problems = [p for p in problems if p.key not in ELSEWHERE]
    if is_meant_to_fail(document, command) or "dataset.image_size=100" in overrides:
        assert problems
    else:
        assert not problems, "\n".join(map(str, problems))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_verb_is_documented():
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert [verb for verb in VERBS if f"`{verb}" not in reference] == []


def test_settings_named_in_tables_exist():
    """`group.key` in backticks names a setting of some choice of that group."""
    keys = known_keys()
    for document in DOCUMENTS:
        for key in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", document.read_text()):
            if key.split(".")[0] in {k.split(".")[0] for k in keys} and not key.endswith(
                (".py", ".md", ".yaml", ".jsonl", ".safetensors", ".")
            ):
                assert key in keys, f"{document.name}: there is no {key}"


def known_keys() -> set[str]:
    import dataclasses

    def walk(config, prefix):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            yield f"{prefix}{field.name}"
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{field.name}.")

    choices = [[], ["model=timm", "model.name=vit_tiny_patch16_224"], ["optimizer=sgd"], ["optimizer=timm", "optimizer.name=lamb"], ["dataset=image_folder"], ["dataset=coco"],
               ["task=detection"], ["model=mit_b0"], ["augmentation=boxes"],
               ["dataset=webdataset"], *([f"scheduler={p.stem}"] for p in (ROOT / "conf" / "scheduler").glob("*.yaml")),
               *([f"augmentation={p.stem}"] for p in (ROOT / "conf" / "augmentation").glob("*.yaml"))]  # fmt: skip
    found: set[str] = set()
    for overrides in choices:
        run, _ = checked(compose(overrides))
        found |= set(walk(run, "")) if run is not None else set()
    return found
