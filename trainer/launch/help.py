"""`--help`: every setting of the run that the command line asks for, explained from its dataclasses.

Hydra's own help renders a template and costs more than composing does; it is not used.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

from trainer.config import RunConfig
from trainer.config.fields import allowed, as_override, field_problems, type_in_words
from trainer.config.launcher import LauncherConfig
from trainer.config.sweeper import OptunaSweeperConfig
from trainer.errors import ConfigError
from trainer.launch.compose import Composed, choices, hydra_loader
from trainer.launch.diagnose import with_fix
from trainer.launch.origin import origins
from trainer.launch.resolve import displace, to_object, to_run

USAGE = """\
python launch.py [group=choice ...] [key=value ...]

One run: its groups are chosen by name, its settings set by key; the command line wins over YAML.
--cfg job shows the composed config, -m key=1,2,3 starts a job for each value, here or on
SLURM (--help hydra/launcher=slurm), or a search (--help hydra/sweeper=optuna); more: --hydra-help.
Completion: eval "$(python launch.py -sc install=bash)". What is not training: python -m trainer."""


def explain(composed: Composed, width: int = 100, *, bold: bool = False) -> str:
    """The help for a composed command line.

    Raises:
        ConfigError: the command line itself is wrong. What the run lacks otherwise is no reason not to explain it.
    """
    displaced = displace(composed.tree, composed.given)
    run, problems = to_run(composed.tree, composed.given)
    problems = [*composed.problems, *(p for p in [*problems, *(field_problems(run) if run else ())] if p.key in composed.given)]
    if problems or run is None:
        raise ConfigError(*(with_fix(p, composed.before) for p in problems))
    page = _Page(width, bold, origins(composed), composed, displaced)
    lines = [USAGE, "", *page.groups(), *page.settings(run)]
    for part in ("launcher", "sweeper"):
        if any(line.startswith(f"hydra/{part}=") for line in composed.lines):
            lines += page.hydras(part)
    return "\n".join(lines)


class _Page:
    """Writes down a run. Lines are at most `width` characters wide, but for values that have no spaces to break at."""

    def __init__(
        self, width: int, bold: bool, found: Mapping[str, tuple[str, Any]], composed: Composed, displaced: Mapping[str, str]
    ) -> None:
        self.width = width
        self.bold = bold
        self.found = found
        self.composed = composed
        self.displaced = displaced

    def groups(self) -> Iterator[str]:
        """Every group with its choices, the chosen one marked."""
        yield self._strong("Groups") + " (* = chosen)"
        with hydra_loader() as loader:
            search = [line for line in self.composed.lines if line.startswith("hydra.searchpath")]
            options = {name: choices(loader, name, search) for name in loader.list_groups("") if name != "hydra"}
        order = [f.name for f in dataclasses.fields(RunConfig) if f.name in options]
        column = max(map(len, options)) + 4
        for name in [*order, *sorted(set(options) - set(order))]:
            chosen = self.composed.choices.get(name)
            text = " ".join(f"{choice}*" if choice == chosen else choice for choice in options[name]) or "(none yet)"
            yield from self._wrapped(text, first=f"  {name}".ljust(column), rest=" " * column)

    def settings(self, run: RunConfig) -> Iterator[str]:
        """Every setting, group by group."""
        hints = get_type_hints(RunConfig)
        parts = [f for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(getattr(run, f.name))]
        yield f"\n{self._strong('run')}"
        for f in dataclasses.fields(RunConfig):
            if f not in parts:
                yield from self._setting(f.name, f, hints[f.name], getattr(run, f.name))
        for f in parts:
            part = getattr(run, f.name)
            yield "\n" + self._strong(f"{f.name}={self.composed.choices.get(f.name)}")
            yield from self._wrapped(_doc(type(part)) or _doc(hints[f.name]))
            yield from self._fields(part, f.name)

    def hydras(self, part: str) -> Iterator[str]:
        """The settings of a launcher, or a sweeper, of ours; Hydra's own explain themselves in --hydra-help."""
        settings = to_object(self.composed.hydra[part])
        if isinstance(settings, LauncherConfig | OptunaSweeperConfig):
            yield "\n" + self._strong(f"hydra/{part}={self.composed.hydra.runtime.choices[f'hydra/{part}']}")
            yield from self._wrapped(_doc(type(settings)))
            yield from self._fields(settings, f"hydra.{part}")

    def _fields(self, config: Any, at: str) -> Iterator[str]:
        hints = get_type_hints(type(config))
        for f in (f for f in dataclasses.fields(config) if f.metadata):  # what has no meaning to a user is Hydra's
            value, key = getattr(config, f.name), f"{at}.{f.name}"
            if dataclasses.is_dataclass(value):
                yield from self._fields(value, key)
            else:
                yield from self._setting(key, f, hints[f.name], value)

    def _setting(self, key: str, f: dataclasses.Field[Any], hint: Any, value: Any) -> Iterator[str]:
        head = f"  {key} = {'???' if value == MISSING else as_override(value)}"
        source = self._source(key, f, value)
        shown = head.replace(key, self._strong(key), 1)
        if len(head) + len(source) + 2 <= self.width:
            yield shown + source.rjust(self.width - len(head))
        else:
            yield from (shown, source.rjust(self.width))
        yield from self._wrapped(_meaning(f, hint), first=" " * 6, rest=" " * 6)
        for entry in [kind for kind in get_args(hint) if dataclasses.is_dataclass(kind)]:  # what an entry of the list holds
            entry_hints = get_type_hints(entry)
            for inner in dataclasses.fields(entry):
                yield from self._wrapped(f"{inner.name}: {_meaning(inner, entry_hints[inner.name])}", first=" " * 8, rest=" " * 10)

    def _source(self, key: str, f: dataclasses.Field[Any], value: Any) -> str:
        file, in_file = self.found.get(key, ("", None))
        if key in self.displaced:
            return f"set aside by {self.displaced[key]}"
        if key in self.composed.given:
            before = self.composed.before.get(key)
            return f"command line; {as_override(before)} in {file}" if file else f"command line; default {as_override(before)}"
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if file and default not in (MISSING, dataclasses.MISSING, in_file):
            return f"{file}; default {as_override(default)}"
        return file or ("needs a value" if value == MISSING else "default")

    def _wrapped(self, text: str, first: str = "", rest: str = "") -> list[str]:
        return textwrap.wrap(text, self.width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)

    def _strong(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self.bold else text


def _meaning(f: dataclasses.Field[Any], hint: Any) -> str:
    takes = ", ".join(filter(None, [type_in_words(hint), allowed(f.metadata)]))
    if f.metadata.get("words"):
        takes = f"a whole number {allowed(f.metadata)}"
    meaning = f.metadata.get("help", "")
    return f"{meaning} ({takes})" if meaning else f"({takes})"


def _doc(kind: type[Any]) -> str:
    """The first paragraph of a class's docstring; a dataclass without one has its signature in its place."""
    paragraph = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return "" if paragraph.startswith(f"{kind.__name__}(") else paragraph
