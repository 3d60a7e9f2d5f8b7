"""What happens between the command line and the first line of a run."""

from __future__ import annotations

import itertools
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config import RunConfig
from trainer.errors import ConfigError, Interrupted, Problem, Stopped, TrainyardError
from trainer.launch import diagnose
from trainer.launch.compose import checked, compose, compose_run
from trainer.launch.guard import FULL_ERROR, guarded, report, speaks
from trainer.launch.resolve import resolve
from trainer.launch.store import tell_hydra

_MOST_PROBLEMS = 20  # of a sweep; more would bury the first ones


def enter(hydra_main: Callable[[], Any], argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code.

    A single run is composed here: Hydra would compose it twice, stop at the first mistake and exit with 1. The rest of
    its command line (-m, --cfg, --info, completion …) is Hydra's.
    """
    if argv is None:
        sys.argv[1:] = options_first(sys.argv[1:])  # in place: hydra.main reads it there
    return guarded(lambda: _enter(hydra_main, list(sys.argv[1:] if argv is None else argv)))


def options_first(argv: Sequence[str]) -> list[str]:
    """A command line with its overrides behind its options: Hydra refuses `a=1 --cfg job b=2`, which is quickly typed."""
    from hydra._internal.utils import get_args_parser  # the grammar that hydra.main uses

    options = list(argv)
    overrides = get_args_parser().parse_intermixed_args(argv).overrides
    for override in overrides:
        options.remove(override)
    return [*options, *overrides]


def override_arguments(verb: str, description: str) -> ArgumentParser:
    """The command line of a verb that takes what launch.py takes: `checked_run(options.overrides, options.config_dir)`."""
    parser = ArgumentParser(prog=f"python -m trainer {verb}", description=description)
    parser.add_argument("overrides", nargs="*", help="group=choice and key=value, as for launch.py")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder of your own YAML, laid out like conf/")
    return parser


def checked_run(overrides: Sequence[str], config_dir: str | None = None) -> RunConfig:
    """The run behind a command line, with its warnings said. Raises ConfigError with everything that is wrong."""
    from trainer.cautions import warnings_of

    first = speaks()
    try:
        run = compose_run(*overrides, config_dir=config_dir)
    except ConfigError as error:
        error.reported = not first  # type: ignore[attr-defined]
        raise
    for warning in warnings_of(run) if first else ():
        print(f"warning: {warning}", file=sys.stderr)
    return run


def _enter(hydra_main: Callable[[], Any], argv: list[str]) -> int:
    from hydra._internal.utils import get_args_parser  # the grammar that hydra.main uses

    parser = get_args_parser()
    args = parser.parse_args(argv)
    if sum(map(bool, (args.run, args.multirun, args.cfg, args.info, args.shell_completion))) > 1:
        parser.error("one of --run, --multirun, --cfg, --info and --shell-completion at a time")
    if args.resolve and not args.cfg:
        parser.error("--resolve goes with --cfg")
    if args.help:
        from trainer.launch.help import explain

        print(explain(compose(args.overrides, args.config_dir), bold=sys.stdout.isatty()))
        return 0
    options = ("hydra_help", "cfg", "package", "shell_completion", "config_path", "config_name", "experimental_rerun", "info")
    if not any(getattr(args, name) for name in options):
        if (
            args.multirun
            or any(line.startswith(("hydra/launcher=", "hydra.launcher.")) for line in args.overrides)
            or _is_itself_a_sweep(args)
        ):
            return _multirun(hydra_main, args, argv)
        if not _is_hydras(args.overrides):
            return _dispatch(checked_run(args.overrides, args.config_dir))
    return _hydras(hydra_main, args)


def _is_itself_a_sweep(args: Namespace) -> bool:
    """Whether an experiment has `hydra.sweeper.params`: Hydra would run one job of it, with none of them, and say nothing."""
    if not any(line.lstrip("+").startswith("experiment=") for line in args.overrides):
        return False
    return bool(compose(args.overrides, args.config_dir).hydra.sweeper.get("params"))


def _is_hydras(overrides: Sequence[str]) -> bool:
    """Whether a single run asks for something of Hydra's own: a callback, a working directory, environment variables."""
    theirs = [line for line in overrides if line.lstrip("+~").startswith(("hydra.", "hydra/")) and not line.startswith("hydra.searchpath=")]
    for line in theirs:
        _refuse_single(line, ("hydra/sweeper",))
    return bool(theirs)


def _refuse_single(line: str, keys: Sequence[str]) -> None:
    key, _, value = line.partition("=")
    if key in keys:
        # Hydra would ignore it without a word, and train right here.
        raise ConfigError(Problem(key, value, "is about the jobs of a sweep, and this is a single run", f"-m {line}"))


def _multirun(hydra_main: Callable[[], Any], args: Namespace, argv: Sequence[str]) -> int:
    """A sweep. To choose a launcher of ours is to want one, if only of a single job."""
    from trainer.launch.jobs import plan
    from trainer.launch.multirun import start_sweep

    planned = plan(args.overrides, args.config_dir)
    if planned is not None:
        return start_sweep(planned, ["launch.py", *argv])
    if not args.multirun:
        for line in args.overrides:
            _refuse_single(line, ("hydra/launcher", "hydra/sweeper"))
    return _hydras(hydra_main, args)


def _hydras(hydra_main: Callable[[], Any], args: Namespace) -> int:
    """What Hydra does itself, but with our account of what is wrong."""
    tell_hydra()
    if args.multirun:
        _check_sweep(args)
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # lets errors out instead of ending the process with 1
    try:
        hydra_main()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if before not in (None, "", "0"):
            raise
        problems = [] if args.multirun else compose(args.overrides, args.config_dir).problems
        raise ConfigError(*(problems or [diagnose.in_words(error)])) from error
    finally:
        _restore(before)
    return 0


def _dispatch(run: RunConfig) -> int:
    from trainer.launch.dispatch import dispatch  # --help and --cfg need no run directories

    return dispatch(run)


def run_job(cfg: DictConfig) -> None:
    """One job that Hydra starts. What goes wrong is said at once; the jobs after it run all the same, unless told to stop."""
    from trainer.validation import validate

    before = os.environ.pop(FULL_ERROR, None)
    try:
        run = resolve(cfg, HydraConfig.get().overrides.task)
        validate(run)  # another sweeper than the basic one chooses values that nobody could check before
        code = _dispatch(run)
        if code in (Stopped.exit_code, Interrupted.exit_code):
            sys.exit(code)
        if code:
            raise JobFailed(code)
    except TrainyardError as error:
        report(error)
        if isinstance(error, Stopped | Interrupted):
            sys.exit(error.exit_code)
        raise
    finally:
        _restore(before)


class JobFailed(TrainyardError):
    """A job's ranks ended with this code and have said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the job ended with exit code {code}")
        self.exit_code = code


def _check_sweep(args: Namespace) -> None:
    """Compose and check every job before the first one starts."""
    found: dict[tuple[str, str, str], Problem] = {}
    for overrides in jobs(args.overrides):
        for problem in checked(compose(overrides, args.config_dir))[1]:
            found.setdefault((problem.key, str(problem.value), problem.reason), problem)
        if len(found) >= _MOST_PROBLEMS:
            break
    if found:
        raise ConfigError(*found.values())


def jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The command line of every job of a sweep, as Hydra's basic sweeper multiplies them out; none where another sweeper chooses."""
    if any(line.lstrip("+").startswith("hydra/sweeper") for line in overrides):
        return
    parser = OverridesParser.create()
    axes: list[list[str]] = []
    for line in overrides:
        try:
            override = parser.parse_override(line)
            swept = override.is_sweep_override() and not override.is_hydra_override()
            axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()] if swept else [line])
        except HydraException:  # not an override, or a sweep without an end: told where it is composed
            axes.append([line])
    yield from (list(job) for job in itertools.product(*axes))


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(FULL_ERROR, None)
    else:
        os.environ[FULL_ERROR] = before
