"""Checkpoints that are whole or not there: a snapshot in memory, a file written behind training's back, a careful reader.

In use:

    with Writer(directory.checkpoints, keep=1) as writer:
        writer.prepare(state)  # after the first step: memory for the snapshot, touched in the background
        writer.save(state, ["last"])  # returns after the copy
    path, state = newest_good(directory.checkpoints)
"""

from trainer.checkpoint.publish import set_aside
from trainer.checkpoint.reader import CheckpointError, load, newest_good
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.writer import Writer, save_safetensors

__all__ = ["CheckpointError", "Snapshot", "Writer", "load", "newest_good", "save_safetensors", "set_aside"]
