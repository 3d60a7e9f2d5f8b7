"""What a launcher asks where a sweep's jobs are not known from the beginning: for the next ones, and which are to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from trainer.sweep.manifest import Job


class Source(Protocol):
    """Chooses jobs as results come in. `at_slurm`: SLURM's words for job ids, where it runs them."""

    def more(self, at_slurm: Mapping[str, str] | None = None) -> Sequence[Job]:
        """Jobs to be run beside those that are open, in the manifest already; none where there are none, or none yet."""
        ...

    def unwanted(self, at_slurm: Mapping[str, str] | None = None) -> Sequence[Job]:
        """Running jobs to be told to stop: their directories hold the reason why (`RunDirectory.ask_to_prune`)."""
        ...
