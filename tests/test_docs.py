"""What the documents tell people to type works: every command composes, every verb exists, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from trainer.__main__ import VERBS
from trainer.errors import ConfigError, Problem
from trainer.launch.amend import amended
from trainer.launch.compose import checked, compose, compose_run
from trainer.launch.door import options_first
from trainer.launch.guard import report
from trainer.launch.jobs import plan
from trainer.validation import problems_of as invalid

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# What lies on the reader's disk and not on ours.
ELSEWHERE = ("dataset.path", "dataset.val_path", "dataset.info", "dataset.class_file", "init_from", "task.teacher")
OWN_WORDS = ("checkpoint", "classes", "split", "real_labels")


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
    problems = problems_of(command, tmp_path)
    if is_meant_to_fail(document, command) or "dataset.image_size=100" in command:
        assert problems
    else:
        assert not problems, "\n".join(map(str, problems))


def sweep_problems(overrides: list[str]) -> list[Problem]:
    """What is wrong with a sweep, but for what only the cluster can say, and this host's lack of GPUs."""
    try:
        plan([o for o in overrides if "gpus_per_job" not in o])
    except ConfigError as error:
        return [p for p in error.problems if isinstance(p, Problem)]
    return []


def words_of(command: str) -> list[str]:
    """The words a shell makes of it, with something for each `<name>` that the reader has to fill in, some of them nested."""
    return shlex.split(re.sub(r"<(?:[^<>]|<[^<>]*>)*>", "filled-in", command), comments=True)


def problems_of(command: str, tmp_path: Path) -> list[Problem]:
    """Everything wrong with a command of one of our programs, but for what lies on the reader's disk.

    The words are taken apart by the program's own parser, which ends the process where it does not know an option.
    """
    words = words_of(command)
    if "trainer" in words:
        verb, rest = words[words.index("trainer") + 1], words[words.index("trainer") + 2 :]
        assert verb in VERBS or verb == "filled-in", f"no verb {verb}"
        options = options_of(verb, rest) if verb in VERBS else Namespace()
        if hasattr(options, "run_dir"):  # the overrides are of a run that exists: here, one of the defaults
            return amended(DEFAULTS, [o for o in getattr(options, "overrides", []) if o.split("=")[0] not in OWN_WORDS])[2]
        sweeps = verb == "plan"
    else:
        rest = words[next(i for i, word in enumerate(words) if word.endswith("launch.py")) + 1 :]
        options = get_args_parser().parse_args(options_first(rest))
        sweeps = options.multirun or any(o.startswith("hydra/launcher=") for o in options.overrides)
    overrides, config_dir = getattr(options, "overrides", []), getattr(options, "config_dir", None)
    if config_dir is not None:
        config_dir = str(tmp_path)
        (tmp_path / "experiment").mkdir()
        for name in ("mine", "base"):
            (tmp_path / "experiment" / f"{name}.yaml").write_text("# @package _global_\nname: mine\nloop: {epochs: 3}\n")
    if sweeps:
        return [p for p in sweep_problems([o for o in overrides if "sweep.file=" not in o]) if p.key not in ELSEWHERE]
    _, problems = checked(compose(overrides, config_dir))
    return [p for p in problems if p.key not in ELSEWHERE]


def options_of(verb: str, words: list[str]) -> Namespace:
    """What the verb's own parser makes of its words."""
    module = import_module(VERBS[verb][0].split(":")[0])
    shared = sum(where.startswith(f"{module.__name__}:") for where, _ in VERBS.values()) > 1
    parser = module.arguments(verb) if shared else module.arguments()
    return parser.parse_args(words) if verb == "shards" else parser.parse_intermixed_args(words)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "start"])  # which is for our own launchers, and takes one word
def test_every_verb_refuses_an_option_that_it_does_not_have(verb, capsys):
    with pytest.raises(SystemExit, match="2"):
        options_of(verb, ["--no-such-option"])
    assert f"python -m trainer {verb}" in capsys.readouterr().err


DEFAULTS = compose_run()


def table_rows() -> list[tuple[str, str, str]]:
    """(what another tool calls it, ours, a remark) of every row of a table that maps one to the other."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / "from-other-tools.md").read_text(), re.MULTILINE):
        head, _, *lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        if head[1:] == ["here", ""]:
            found += [(theirs, ours, remark) for theirs, ours, remark in lines]
    return found


@pytest.mark.parametrize(("theirs", "ours", "remark"), table_rows(), ids=lambda cell: cell[:40])
def test_what_another_tool_has_is_an_override_here_or_there_is_a_reason(theirs, ours, remark, tmp_path):
    spans = re.findall(r"`([^`]+)`", ours)
    if not spans:
        assert ours == "—" and len(remark) > 10, f"{theirs}: neither an override nor the reason why there is none"
    for span in spans:
        words = shlex.split(span)
        if all("." in word.split("=")[0] for word in words):  # settings alone: Hydra need not choose groups for each row anew
            run, _, problems = amended(DEFAULTS, words)
            problems += invalid(run) if run is not None else []
        else:
            problems = problems_of(span if re.match(r"python|torchrun", span) else f"python launch.py {span}", tmp_path)
        assert not problems, f"{theirs}:\n" + "\n".join(map(str, problems))


FLAGS = """
amp amp-dtype aug-level aug-type backbone-layer-decay backbone-lr batch-size bce-loss bce-threshold bias-lr bias-weight-decay channels channels-last
clip-grad-norm compile compile-backbone compile-fullgraph compile-mode compile-opt compile-recompile-limit cooldown-epochs cooldown-steps
custom-layer-lr-scale custom-layer-wd cutmix data-path data-val ddp-comm-dtype distributed-mode drop-last epochs experiment fast-matmul
find-unused-parameters freeze-backbone-bn freeze-bn freeze-body freeze-layers freeze-module freeze-stages fsdp grad-accum-steps
grad-anomaly-detection grad-checkpointing grad-checkpointing-segments help img-loader keep-last layer-decay layer-decay-min-scale
layer-decay-no-opt-scale load-ema load-scheduler load-states log-interval lr lr-cosine-fraction lr-cosine-min lr-power lr-scale lr-scale-type
lr-scheduler lr-scheduler-update lr-step-gamma lr-step-size lr-steps mesa mesa-start-epoch mesa-weight mixup-alpha mixup-cutmix-prob model-dtype
model-ema model-ema-decay model-ema-steps model-ema-warmup moe-training momentum nesterov network no-broadcast-buffers no-summary non-interactive
non-strict-weights norm-wd num-workers opt opt-alpha opt-betas opt-eps opt-fused plot-lr prefetch-factor pretrained ra-magnitude ra-num-ops ra-reps
ra-sampler re-prob reset-head resize-min-scale resume-epoch rgb-mean rgb-mode rgb-std save-frequency seed simple-crop size smoothing-alpha
steps-per-epoch stop-epoch sync-bn tag top-k transformer-embedding-decay unfreeze-features use-deterministic-algorithms use-fake-data val-path
warmup-epochs warmup-steps wd wd-end wds wds-class-file wds-info wds-train-size wds-training-split wds-val-size wds-val-split

cfg-file cfg-files cfg-default ckpt-dir name version gpus
"""
"""Those of birder that concern classification, and those of SlowTV. ERA4's scripts have none; its table is by feature."""


@pytest.mark.parametrize("flag", FLAGS.split())
def test_every_flag_of_the_tools_that_are_united_here_has_a_row(flag):
    assert any(re.search(rf"--{flag}(?![\w-]*\w)", theirs) for theirs, _, _ in table_rows()), (
        f"docs/from-other-tools.md says nothing of --{flag}"
    )


def test_verbs_named_in_a_sentence_exist():
    for document in DOCUMENTS:
        for verb in re.findall(r"`(?:\.venv/bin/)?python -m trainer ([a-z-]+)", document.read_text()):
            assert verb in VERBS, f"{document.name}: no verb {verb}"


def test_the_mistakes_that_a_document_shows_are_told_as_it_shows_them(capsys):
    shown = 0
    for document in DOCUMENTS:
        for command, said in re.findall(r"\$ (python launch\.py [^\n]*)\n(.*?)^ *```", document.read_text(), re.S | re.M):
            report(ConfigError(*problems_of(command, Path())))
            told = capsys.readouterr().err
            assert [line.strip() for line in said.split("\n") if line.strip()] == [
                line.strip() for line in told.split("\n") if line.strip()
            ]
            shown += 1
    assert shown


def test_benchmarks_that_are_named_exist():
    from benchmarks import rows
    from benchmarks.table import ROWS

    rows.load()
    for document in DOCUMENTS:
        for line in re.findall(r"^(?:\S*/)?python -m benchmarks([^#\n]*)", document.read_text(), re.MULTILINE):
            words = re.sub(r"--json \S+|--quick", "", line).split()
            assert set(words) <= set(ROWS), f"{document.name}: there is no row {words}"


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
                (".py", ".md", ".yaml", ".jsonl", ".safetensors", ".onnx", ".pt", ".pt2", ".")
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

    choices = [[], ["model=timm", "model.name=vit_tiny_patch16_224"], ["optimizer=sgd"], ["optimizer=timm", "optimizer.name=lamb"], ["dataset=image_folder"], ["dataset=coco"], ["task=part_discovery"],
               ["dataset=waterbirds"], ["dataset=cub"], ["dataset=siim_acr"],
               ["task=detection"], ["model=mit_b0"], ["augmentation=boxes"],
               ["dataset=webdataset"], *([f"scheduler={p.stem}"] for p in (ROOT / "conf" / "scheduler").glob("*.yaml")),
               *([f"augmentation={p.stem}"] for p in (ROOT / "conf" / "augmentation").glob("*.yaml")),
               *([f"task={p.stem}"] for p in (ROOT / "conf" / "task").glob("*.yaml"))]  # fmt: skip
    found: set[str] = set()
    for overrides in choices:
        run, _ = checked(compose(overrides))
        found |= set(walk(run, "")) if run is not None else set()
    return found
