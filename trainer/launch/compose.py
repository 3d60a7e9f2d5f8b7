"""Compose a run from conf/ and the command line, as Hydra does, but to the end: everything wrong with it is collected.

Hydra stops at the first bad override. Here the groups are composed first, then every `key=value` is applied by itself.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import trainer.launch.resolvers  # noqa: F401  (importing registers what YAML may call)
from trainer.config import RunConfig
from trainer.config.schemas import announce_schemas
from trainer.errors import ConfigError, Problem
from trainer.launch import diagnose
from trainer.launch.resolve import flat, to_run, value_at
from trainer.launch.store import tell_hydra

_HERE = Path(__file__).resolve().parent
announce_schemas("trainer.data.schemas", _HERE.parent / "data" / "schemas")
CONF = next((p for p in (_HERE.parents[1] / "conf", _HERE.parent / "conf") if (p / "config.yaml").is_file()), _HERE.parents[1] / "conf")
"""conf/: beside trainer/ in a checkout, inside it in an installed wheel."""


@dataclass
class Composed:
    """A command line, composed as far as it goes."""

    tree: DictConfig  # the job's part, without Hydra's own node
    hydra: DictConfig
    lines: list[str] = field(default_factory=list)  # the overrides that Hydra composed it with: groups, and its own
    given: dict[str, Any] = field(default_factory=dict)  # what the command line set, by dotted key
    before: dict[str, Any] = field(default_factory=dict)  # what the same keys were in YAML
    problems: list[Problem] = field(default_factory=list)

    @property
    def choices(self) -> dict[str, str]:
        """Which choice each group has."""
        return {str(group): choice for group, choice in self.hydra.runtime.choices.items() if not str(group).startswith("hydra/")}


def compose_run(*overrides: str, config_dir: str | None = None) -> RunConfig:
    """The run that the command line `overrides` asks for: `compose_run("task=classification", "loop.steps=3")`.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    run, problems = checked(compose(overrides, config_dir))
    if problems:
        raise ConfigError(*problems)
    assert run is not None
    return run


def checked(composed: Composed, rules: Callable[[RunConfig], Iterable[Problem]] | None = None) -> tuple[RunConfig | None, list[Problem]]:
    """The run, where it could be made, and everything wrong with it, by `rules`: None is by those of a run that is to train."""
    from trainer.validation import problems_of

    run, problems = to_run(composed.tree, composed.given)
    problems = [*composed.problems, *problems]
    if run is not None:
        told = {p.key for p in problems}  # a key that has a problem already would only be told a second time
        found = (p for p in (rules or problems_of)(run) if p.key not in told)
        # A run knows the class of a part; the user has typed the choice.
        problems += [dataclasses.replace(p, value=composed.choices[p.key]) if p.key in composed.choices else p for p in found]
    return run, [diagnose.with_fix(p, composed.before) for p in problems]


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Composed:
    """Compose what can be composed. `config_dir` holds a user's own YAML, which is looked for after conf/.

    Raises:
        ConfigError: nothing can be composed at all: a broken file, a choice that contradicts another.
    """
    with Composer(config_dir, keep=False) as composer:
        return composer.compose(overrides)


class Composer:
    """Composes many command lines: Hydra composes once for every set of choices, and settings are applied to copies of that."""

    def __init__(self, config_dir: str | None = None, *, keep: bool = True) -> None:
        self._config_dir = config_dir
        self._keep = keep
        self._composed: dict[
            tuple[str, ...], tuple[DictConfig, DictConfig, Any]
        ] = {}  # lines -> tree, Hydra's node, what ${hydra:...} reads
        self._open = ExitStack()

    def __enter__(self) -> Composer:
        self.loader = self._open.enter_context(hydra_loader())
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def compose(self, overrides: Sequence[str]) -> Composed:
        """As the function of that name."""
        parsed, problems = parse(overrides)
        search, parsed = _search_path(parsed, self._config_dir, problems)
        groups, settings = _split(parsed, self.loader, search, problems)
        composed = self._chosen((*search, *groups), problems)
        for problem in problems:  # where nothing else is at hand, the way out is what is there without the bad override
            composed.before.setdefault(problem.key, composed.choices.get(problem.key, value_at(composed.tree, problem.key)))
        for override in settings:
            apply_to(composed, override, self.loader)
        return composed

    def _chosen(self, lines: tuple[str, ...], problems: list[Problem]) -> Composed:
        if lines not in self._composed:
            try:
                cfg = hydra_compose("config", list(lines), return_hydra_config=True)
            except diagnose.COMPOSING_FAILED as error:
                raise ConfigError(*problems, diagnose.in_words(error)) from error
            composed = _taken_apart(cfg, list(lines), problems)
            if not self._keep:
                return composed
            self._composed[lines] = (composed.tree, composed.hydra, HydraConfig.instance().cfg)
        tree, hydra, HydraConfig.instance().cfg = self._composed[lines]
        return Composed(copy.deepcopy(tree), hydra, list(lines), problems=problems)


def parse(lines: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Every line that Hydra's grammar accepts, and what is wrong with the others."""
    parsed, problems = [], []
    for line in lines:
        try:
            override = parse_line(line)
        except (HydraException, AssertionError) as error:  # "+=[1]" is a key without a name
            problems.append(diagnose.not_an_override(line, error))
            continue
        if override.is_sweep_override() and not override.is_hydra_override():
            problems.append(diagnose.a_sweep(override))
        else:
            parsed.append(override)
    return parsed, problems


@lru_cache(maxsize=4096)  # the jobs of a sweep have most lines in common
def parse_line(line: str) -> Override:
    return OverridesParser.create().parse_override(line)


@contextmanager
def hydra_loader() -> Iterator[ConfigLoader]:
    """Hydra's view of conf/."""
    tell_hydra()
    with initialize_config_dir(str(CONF), job_name="launch", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra.config_loader


def _search_path(parsed: list[Override], config_dir: str | None, problems: list[Problem]) -> tuple[list[str], list[Override]]:
    """Where to look for YAML besides conf/, as one override for Hydra; and the overrides that are left."""
    mine = [o for o in parsed if o.key_or_group == "hydra.searchpath"]
    places = [place for o in mine if isinstance(o.value(), list) for place in o.value()]  # type: ignore[union-attr]
    if config_dir is not None:
        directory = Path(config_dir).expanduser().absolute()
        if directory.is_dir():
            places.append(f"file://{directory}")
        else:
            problems.append(Problem("--config-dir", config_dir, "no such directory", "--config-dir=<a folder laid out like conf/>"))
    search = ["hydra.searchpath=[" + ",".join(f"'{place}'" for place in places) + "]"] if places else []
    return search, [o for o in parsed if o not in mine]


def _split(parsed: list[Override], loader: ConfigLoader, search: list[str], problems: list[Problem]) -> tuple[list[str], list[Override]]:
    """Overrides for Hydra to compose (its own, and groups with a choice they have), and the settings."""
    groups, settings = [], []
    for override in parsed:
        line = str(override.input_line)
        group, value = override.key_or_group, override.value()
        if override.is_hydra_override() and not group.startswith("hydra/"):
            groups.append(line)
            continue
        options = choices(loader, group, search)
        if not options or isinstance(value, dict):
            settings.append(override)
        elif override.is_delete() or (all(v in options for v in value) if isinstance(value, list) else value in options):
            groups.append(line)
        else:
            problem, close = diagnose.unknown_choice(override, options)
            problems.append(problem)
            if close:  # go on as if this had been meant, so that its settings can be checked
                groups.append(f"{override.get_key_element()}={close}")
    return groups, settings


def choices(loader: ConfigLoader, group: str, search: list[str]) -> list[str]:
    """The choices of a group. Hydra's own listing copies everything it knows, each time; needed only for a longer search path."""
    if search:
        return loader.get_group_options(group, config_name="config", overrides=search)
    return sorted({name for source in loader.get_sources() if source.is_group(group) for name in source.list(group, ObjectType.CONFIG)})


def _taken_apart(cfg: DictConfig, lines: list[str], problems: list[Problem]) -> Composed:
    HydraConfig.instance().set_config(cfg)  # what ${hydra:...} reads
    hydra = cfg.hydra
    OmegaConf.set_readonly(hydra, None)
    tree = cfg
    with open_dict(tree):
        del tree["hydra"]
    return Composed(tree, hydra, lines, problems=problems)


def apply_to(composed: Composed, override: Override, loader: ConfigLoader) -> None:
    """Apply one setting, or say why that cannot be."""
    tree, key, value = composed.tree, override.key_or_group, override.value()
    problem = diagnose.wrong_place(override, tree, loader)
    if problem:
        composed.problems.append(problem)
        return
    composed.before.setdefault(key, value_at(tree, key))
    try:
        if override.is_delete():
            parent, _, name = key.rpartition(".")
            with open_dict(tree):
                del OmegaConf.select(tree, parent)[name]
        else:
            OmegaConf.update(tree, key, value, merge=True, force_add=override.is_add() or override.is_force_add())
    except OmegaConfBaseException as error:
        composed.problems.append(diagnose.wrong_value(override, tree, error))
        return
    composed.given.update(flat(key, value))
