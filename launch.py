"""The one entry point: compose a run from conf/ and the command line, check it, run it.

python launch.py                                      # a classifier on real images of digits
python launch.py task=classification --help           # every field of this run, explained
torchrun --nproc-per-node=8 launch.py                 # one node
python launch.py -m seed=1,2,3                        # a sweep, on this host or on SLURM
"""

import sys

import hydra
from omegaconf import DictConfig

import tasks  # noqa: F401  (importing registers the tasks' schemas)
from trainer.launch import door
from trainer.launch.compose import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    door.run_job(cfg)


if __name__ == "__main__":
    sys.exit(door.enter(main))
