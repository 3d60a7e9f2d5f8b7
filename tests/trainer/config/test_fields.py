"""A field's own metadata finds what OmegaConf lets through, in every kind of field, however deep it lies."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from trainer.config.fields import MISSING, allowed, as_override, field_problems, setting, type_in_words
from trainer.config.schemas import announce_schemas, schemas
from trainer.launch.store import tell_hydra


class Colour(Enum):
    red = 1
    blue = 2


@dataclass
class Inner:
    rate: float = setting(0.5, "a rate", ge=0, le=1)


@dataclass
class Outer:
    count: int = setting(1, "things", ge=1)
    share: float = setting(0.1, "part", gt=0, lt=1)
    maybe: float | None = setting(None, "perhaps", gt=0)
    flag: bool = setting(False, "yes or no", ge=1)  # a bool is no number, whatever the range says
    colour: Colour = setting(Colour.red, "colour")
    pair: list[float] = setting([0.1, 0.9], "from, to", ge=0, lt=1, length=2)
    word: str = setting("fast", "speed", choices=["fast", "slow"])
    words: list[str] = setting(["fast"], "speeds", choices=["fast", "slow"])
    workers: Any = setting("auto", "processes", ge=0, words=["auto"])
    weights: dict[str, float] = setting({}, "weight per name", ge=0)
    matrix: list[list[float]] = setting([[1.0]], "rows", gt=0)
    inner: Inner = field(default_factory=Inner)
    several: list[Inner] = setting([], "many")
    named: dict[str, Inner] = setting({}, "by name")
    unset: float = setting(help="no default", ge=2)


def problems(**changes: Any) -> dict[str, str]:
    config = Outer(**{"unset": 3.0, **changes})
    return {p.key: p.reason for p in field_problems(config)}


def test_sound_values_have_no_problems():
    assert problems() == {}
    assert problems(maybe=1.0, workers=4, pair=[0, 0.5], words=["slow", "fast"], named={"a": Inner()}, flag=True) == {}


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"count": 0}, "count", "must be >= 1"),
        ({"share": 0.0}, "share", "must be > 0, < 1"),
        ({"share": 1.0}, "share", "must be > 0, < 1"),
        ({"share": math.nan}, "share", "must be a finite number, > 0, < 1"),
        ({"maybe": math.inf}, "maybe", "must be a finite number, > 0"),
        ({"maybe": -1.0}, "maybe", "must be > 0"),
        ({"count": -(10**400)}, "count", "must be >= 1"),  # larger than any float
        ({"pair": [0.5]}, "pair", "needs exactly 2 values, got 1"),
        ({"pair": [0.5, 1.0]}, "pair", "entry 1 must be >= 0, < 1"),
        ({"pair": [math.nan, 0.5]}, "pair", "entry 0 must be a finite number"),
        ({"word": "quick"}, "word", "must be one of fast, slow"),
        ({"words": ["fast", "quick"]}, "words", "entry 1 must be one of fast, slow"),
        ({"workers": "many"}, "workers", "must be a whole number >= 0, or auto"),
        ({"workers": 1.5}, "workers", "must be a whole number >= 0, or auto"),
        ({"workers": True}, "workers", "must be a whole number >= 0, or auto"),
        ({"workers": -1}, "workers", "must be >= 0, or auto"),
        ({"weights": {"a": 1.0, "b": -1.0}}, "weights", "entry b must be >= 0"),
        ({"matrix": [[1.0], [2.0, 0.0]]}, "matrix", "entry 1 entry 1 must be > 0"),
        ({"inner": Inner(2.0)}, "inner.rate", "must be >= 0, <= 1"),
        ({"several": [Inner(), Inner(-1.0)]}, "several[1].rate", "must be >= 0, <= 1"),
        ({"named": {"b": Inner(math.nan)}}, "named.b.rate", "must be a finite number"),
        ({"unset": "???"}, "unset", "has no value: must be >= 2"),
    ],
)
def test_a_bad_value_is_found_wherever_it_lies(changes, key, reason):
    found = problems(**changes)
    assert list(found) == [key]
    assert found[key].startswith(reason)


def test_every_problem_is_found_not_only_the_first():
    assert set(problems(count=0, share=2.0, word="x", inner=Inner(3.0))) == {"count", "share", "word", "inner.rate"}


def test_the_way_out_is_an_override_with_the_default():
    config = Outer(unset=3.0, pair=[0.1], count=0, share=9.0)
    fixes = {p.key: p.fix for p in field_problems(config, "outer")}
    assert fixes == {"outer.pair": "outer.pair=[0.1,0.9]", "outer.count": "outer.count=1", "outer.share": "outer.share=0.1"}


def test_a_list_default_is_not_shared():
    a, b = Outer(unset=3.0), Outer(unset=3.0)
    a.pair.append(0.3)
    assert b.pair == [0.1, 0.9]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (bool, "true or false"),
        (Colour, "one of red, blue"),
        (list[float], "a list of numbers"),
        (list[list[str]] | None, "a list of lists of texts or null"),
        (dict[str, Any], "a mapping"),
        (list[Inner], "a list of mappings"),
        (Any, "a value"),
    ],
)
def test_types_are_named_in_words(hint, words):
    assert type_in_words(hint) == words


def test_ranges_are_named_in_words():
    metadata = {f.name: f.metadata for f in dataclasses.fields(Outer)}
    assert allowed(metadata["pair"]) == ">= 0, < 1, 2 values"
    assert allowed(metadata["colour"]) == ""


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="ascii", min_codepoint=32), max_size=8),
    lambda children: st.lists(children, max_size=3),
    max_leaves=5,
)


@given(plain_values)
def test_a_value_typed_as_shown_is_the_value(value):
    """Hydra's own grammar reads back what `as_override` writes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if isinstance(value, str) and value.endswith("\\"):
        return  # a quoted string of Hydra's cannot end in a backslash: it would escape the quote
    shown = as_override(value)
    assert OverridesParser.create().parse_override(f"key={shown}").value() == value


def test_a_missing_value_is_written_as_omegaconf_writes_it():
    import omegaconf

    assert MISSING == omegaconf.MISSING


def test_a_schema_is_found_by_name_but_not_listed_as_a_choice():
    from hydra.core.config_store import ConfigStore

    tell_hydra()
    store = ConfigStore.instance()
    assert "adamw" in schemas("optimizer")
    assert not [name for name in store.list("optimizer") if "schema" in name]
    node = store.load("optimizer/adamw_schema.yaml").node
    assert OmegaConf.get_type(node) is schemas("optimizer")["adamw"]
    assert store.load("optimizer/adamw_schema.yaml").node is not node  # a copy each: what Hydra merges into one stays there


def test_announced_schemas_are_imported_when_they_are_chosen(tmp_path, monkeypatch):
    from hydra.core.config_store import ConfigStore

    (tmp_path / "announced").mkdir()
    source = "from dataclasses import dataclass\nfrom trainer.config.fields import setting\nfrom trainer.config.schemas import schema\n\n@schema('GROUP', 'one')\n@dataclass\nclass One:\n    size: int = setting(3)\n"
    for module, group in (("first", "zoo"), ("second", "garden")):
        (tmp_path / "announced" / f"{module}.py").write_text(source.replace("'", '"').replace("GROUP", group))
    monkeypatch.syspath_prepend(tmp_path)
    announce_schemas("announced", tmp_path / "announced")
    tell_hydra()
    assert "announced.first" not in sys.modules
    copy.deepcopy(ConfigStore.instance())  # as Hydra does again and again
    assert "announced.first" not in sys.modules
    assert ConfigStore.instance().load("zoo/one_schema.yaml").node.size == 3
    assert "announced.second" not in sys.modules
    assert [kind.__module__ for kind in schemas("garden").values()] == ["announced.second"]
    announce_schemas("announced", tmp_path / "announced")  # what is there already stays
    assert [kind.__module__ for kind in schemas("zoo").values()] == ["announced.first"]
