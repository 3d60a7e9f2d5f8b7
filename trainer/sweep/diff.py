"""`python -m trainer diff A B`: what differs between two runs (or two sweeps: trainer.sweep.sweep_diff), in configuration, code, environment and results."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, Problem
from trainer.log.readable import is_rate, show
from trainer.rundir import RunDirectory
from trainer.sweep.configs import read_plain, settings
from trainer.sweep.found import number, text_of
from trainer.sweep.manifest import FILE

_FILE = re.compile(r"^diff --git a/(.*?) b/", re.MULTILINE)
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_SKIPPED = ("previous", "git", "time", "argv", "data")  # of environment.json: told elsewhere, or always different
_LONGEST = 40  # characters of a value


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer diff", description="What differs between two runs, or two sweeps.")
    parser.add_argument("a", type=Path, metavar="A", help="a run directory, or a sweep's")
    parser.add_argument("b", type=Path, metavar="B", help="another of the kind")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def main(argv: Sequence[str]) -> int:
    options = arguments().parse_intermixed_args(argv)
    if all((path / FILE).exists() for path in (options.a, options.b)):
        from trainer.sweep import sweep_diff

        found = sweep_diff.differences(options.a, options.b)
        told = sweep_diff.lines(options.a, options.b, found)
    else:
        found = differences(_run(options.a), _run(options.b))
        told = lines(options.a, options.b, found)
    print(json.dumps(found, indent=1, ensure_ascii=False) if options.json else "\n".join(told))
    return 0


def differences(a: RunDirectory, b: RunDirectory) -> dict[str, Any]:
    """config and environment: key -> [A, B]; code: in words; metrics: name -> [A, B]."""
    ours, theirs = a.read_environment(), b.read_environment()
    configs = [_config(run) for run in (a, b)]
    matter = [set(settings(config)) for config in configs]
    plain = [settings(config, identity_only=False) for config in configs]
    changed = _changed(*plain)
    return {
        "config": {key: values for key, values in changed.items() if key in matter[0] | matter[1]},
        "without_effect": {key: values for key, values in changed.items() if key not in matter[0] | matter[1]},
        "code": list(_code(ours.get("git"), theirs.get("git"))),
        "environment": _changed(*(dict(_flat({k: v for k, v in e.items() if k not in _SKIPPED})) for e in (ours, theirs))),
        "data": [f"the {split} data" for split, now in (ours.get("data") or {}).items() if (theirs.get("data") or {}).get(split, now) != now],
        "metrics": _metrics(a, b),
    }  # fmt: skip


def _run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    if not run.config_path.is_file():
        reason = "is a sweep, and the other is none" if (path / FILE).exists() else "is no run directory: it holds no config.yaml"
        raise ConfigError(Problem("diff", path, reason, "name two folders like runs/<name>/<version>-<hash>"))
    return run


def _config(run: RunDirectory) -> dict[str, Any]:
    try:
        return read_plain(run.config_path)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("diff", run.config_path, f"cannot be read: {str(error).splitlines()[0]}")) from None


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    absent = object()
    keys = [*a, *(key for key in b if key not in a)]
    return {key: [a.get(key), b.get(key)] for key in keys if a.get(key, absent) != b.get(key, absent)}


def _flat(content: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{at}.{name}" if at else str(name)
        if isinstance(value, Mapping):
            yield from _flat(value, key)
        else:
            yield key, value


def _code(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Iterator[str]:
    """How the code of the second run differs from that of the first."""
    if not a or not b:
        yield "unknown: a run outside of a git repository" if a or b else "unknown: neither was in a git repository"
        return
    if a.get("code") == b.get("code"):
        return
    then, now = str(a.get("commit")), str(b.get("commit"))
    if then != now:
        yield f"commit {then[:10]}, then {now[:10]}"
        yield from _between(then, now)
    files = [set(_FILE.findall(str(side.get("diff") or ""))) | set(side.get("untracked") or ()) for side in (a, b)]
    if a.get("diff") != b.get("diff") or a.get("untracked") != b.get("untracked"):
        for which, names in zip(("first", "second"), files, strict=True):
            yield f"uncommitted in the {which}: {', '.join(sorted(names)[:12]) or 'nothing'}{' …' if len(names) > 12 else ''}"


def _between(then: str, now: str) -> Iterator[str]:
    """git's own summary, where this repository knows both commits."""
    if not (_COMMIT.fullmatch(then) and _COMMIT.fullmatch(now)):  # from a file: it must not be taken for an option
        return
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "diff", "--stat=100", then, now, "--"],
            cwd=Path(__file__).resolve().parent, capture_output=True, timeout=10, text=True, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return
    if done.returncode == 0:
        stat = done.stdout.rstrip().splitlines()
        yield from (line.strip() for line in ([*stat[:15], f"… {len(stat) - 16} more files", stat[-1]] if len(stat) > 17 else stat))


def _metrics(a: RunDirectory, b: RunDirectory) -> dict[str, list[Any]]:
    """Every number of the two results that differs: best and last scores, and what the run took."""
    found = []
    for run in (a, b):
        result = run.read_result() or {}
        rows = {f"{at} {name}": value for at in ("best", "last") for name, value in (result.get(at) or {}).items() if "seconds" not in name}
        found.append(
            rows | {key: result[key] for key in ("steps", "samples", "seconds", "images_per_second", "parameters") if key in result}
        )
    return _changed(*found)


# In words


def lines(a: Path, b: Path, found: Mapping[str, Any]) -> Iterator[str]:
    yield f"A  {a}"
    yield f"B  {b}"
    for title, key in (("configuration", "config"), ("settings that cannot change a result", "without_effect")):
        if found[key] or key == "config":
            yield from _section(title, [(name, _text(x), _text(y), "") for name, (x, y) in found[key].items()])
    yield from ["", "code" if found["code"] else "code: the same", *(f"  {line}" for line in found["code"])]
    yield from (f"  {line} differ" for line in found["data"])
    yield from _section("environment", [(name, _text(x), _text(y), "") for name, (x, y) in found["environment"].items()])
    yield from _section("results", [_result(name, x, y) for name, (x, y) in found["metrics"].items()])


def _section(title: str, rows: Sequence[tuple[str, str, str, str]]) -> Iterator[str]:
    if not rows:
        yield from ("", f"{title}: the same")
        return
    yield from ("", title)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    yield from (f"  {name:{widths[0]}}  {x:>{widths[1]}}  {y:>{widths[2]}}  {note}".rstrip() for name, x, y, note in rows)


def _result(name: str, a: Any, b: Any) -> tuple[str, str, str, str]:
    x, y = number(a), number(b)
    note = ""
    if x is not None and y is not None:
        note = f"{100 * (y - x):+.2f} pp" if is_rate(name) else f"{y - x:+.4g}"
    shown = [show(name, value) if value is not None else "-" for value in (x, y)]
    if shown[0] == shown[1] and x is not None and y is not None:
        shown = [repr(x), repr(y)]  # they differ beyond the digits that are shown
        note = f"{y - x:+.1e}"
    return name, shown[0], shown[1], note


def _text(value: Any) -> str:
    text = text_of(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
