"""Every verb that composes a run takes what launch.py takes: overrides before and behind options, and a folder of one's own YAML."""

from __future__ import annotations

from importlib import import_module

import pytest

from trainer.__main__ import VERBS
from trainer.errors import ConfigError
from trainer.launch.compose import compose_run

COMPOSING = ("validate", "plan", "plot-lr", "find-lr", "show-batch", "bench-loader", "describe-data")


@pytest.mark.parametrize("verb", COMPOSING)
def test_a_folder_of_ones_own_is_searched(verb, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nloop: {epochs: three}\n")
    module, function = VERBS[verb][0].split(":")
    main = getattr(import_module(module), function)
    for words in (["experiment=mine", "--config-dir", str(tmp_path), "seed=1"], [f"--config-dir={tmp_path}", "seed=1", "experiment=mine"]):
        with pytest.raises(ConfigError, match=r"(?s)'three'.*loop\.epochs"):
            main(words)
    with pytest.raises(ConfigError, match="mine"):
        main(["experiment=mine"])


def test_what_is_in_the_folder_is_what_the_verb_works_on(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: of-my-own\n")
    from trainer.launch.check import main
    from trainer.rundir import run_directory

    assert main(["experiment=mine", "--config-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"sound: {run_directory(compose_run('name=of-my-own'))}\n"
