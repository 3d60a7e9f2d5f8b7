"""Where the numbers go besides the run directory, which always has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from trainer.config.fields import setting
from trainer.config.schemas import schema


class WandbMode(Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class WandbConfig:
    """Weights & Biases."""

    enabled: bool = setting(False, "log to Weights & Biases", identity=False)
    project: str = setting("trainyard", "W&B project", identity=False)
    entity: str | None = setting(None, "W&B user or team; null = the default of your key", identity=False)
    group: str | None = setting(None, "W&B group; null = the run's name, so that seeds stand together", identity=False)
    job_type: str | None = setting(None, "W&B job type; null = the task", identity=False)
    mode: WandbMode = setting(
        WandbMode.online, "online falls back to offline, with one warning, where the server or the key is missing", identity=False
    )
    tags: list[str] = setting([], "W&B tags", identity=False)
    resume_id: str | None = setting(None, "go on in this W&B run; null = the one of the run directory, or a new one", identity=False)
    watch: bool = setting(False, "wandb.watch: histograms of gradients and parameters (slow)", identity=False)
    alert: bool = setting(True, "send a W&B alert where the run fails, with the reason", identity=False)
    timeout: float = setting(20.0, "seconds to wait for the server before going offline", gt=0, identity=False)


@dataclass
class TensorboardConfig:
    """TensorBoard."""

    enabled: bool = setting(False, "write TensorBoard events into the run directory", identity=False)


@schema("logger", "logger")
@dataclass
class LoggerConfig:
    """Where the numbers go besides metrics.jsonl."""

    csv: bool = setting(True, "write epochs.csv and batches.csv", identity=False)
    plots: bool = setting(True, "draw loss, metrics and learning rate as PNG", identity=False)
    wandb: WandbConfig = field(default_factory=WandbConfig, metadata={"help": "Weights & Biases", "identity": False})
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig, metadata={"help": "TensorBoard", "identity": False})
