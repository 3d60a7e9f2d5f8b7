"""What Hydra knows of our dataclasses: the schemas of every group, and the settings of our launchers and sweepers."""

from __future__ import annotations

from typing import Any, cast

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from trainer.config.launcher import LAUNCHERS
from trainer.config.schemas import groups, schema_names, schema_of
from trainer.config.sweeper import SWEEPERS


class _Node:
    """A schema's node in Hydra's store, made when it is asked for.

    OmegaConf takes milliseconds for every class it wraps, and a run uses a dozen of all there are. Hydra copies a node
    whenever it reads one, so the copy is the place to make it; when it copies its whole store (a copy with a past: `memo`
    holds the store's other parts), there is nothing to make.
    """

    def __init__(self, group: str, name: str) -> None:
        self.group, self.name = group, name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Node | DictConfig:
        return self if memo else OmegaConf.structured(schema_of(self.group, self.name))


class _Schemas(dict[str, Any]):
    """The schemas of one group. Hydra finds them by name, but does not list them among the group's choices."""

    def keys(self) -> Any:
        return dict[str, Any]().keys()


def tell_hydra() -> None:
    """Put what is registered by now into Hydra's store. Cheap where it is there already; call it before anything is composed."""
    store = ConfigStore.instance()
    for group in groups():
        held = store.repo.setdefault(group, _Schemas()) if group else store.repo
        for name in schema_names(group):
            file = f"{name}_schema.yaml"
            if file not in held:
                node = cast(DictConfig, _Node(group, name))
                held[file] = ConfigNode(name=file, node=node, group=group or None, package=None, provider="trainyard")


for _group, _kinds in (("hydra/launcher", LAUNCHERS), ("hydra/sweeper", SWEEPERS)):
    for _name, _kind in _kinds.items():
        ConfigStore.instance().store(group=_group, name=_name, node=_kind, provider="trainyard")
