"""torch's elastic agent over our own processes: it hands out ranks and the meeting place, and starts all anew when one has died."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, SimpleElasticAgent, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainer.launch.local import LocalRanks

_HOST = "127.0.0.1"
_POLL = 0.1  # seconds between two looks at the processes


def run_agent(ranks: LocalRanks, processes: int, max_restarts: int) -> None:
    """Run `processes` ranks to their end, on a port that the operating system chooses."""
    meeting = get_rendezvous_handler(
        RendezvousParameters("c10d", f"{_HOST}:0", uuid.uuid4().hex, min_nodes=1, max_nodes=1, local_addr=_HOST)
    )
    spec = WorkerSpec(
        "rank", processes, meeting, entrypoint=ranks.command[0], max_restarts=max_restarts, monitor_interval=_POLL, local_addr=_HOST
    )
    try:
        Agent(spec, ranks).run()
    finally:
        meeting.shutdown()


class Agent(SimpleElasticAgent):
    """The four methods that an agent is asked for."""

    def __init__(self, spec: WorkerSpec, ranks: LocalRanks) -> None:
        super().__init__(spec)
        self.ranks = ranks

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        shared = {
            "MASTER_ADDR": worker_group.master_addr,
            "MASTER_PORT": str(worker_group.master_port),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_RESTART_COUNT": str(spec.max_restarts - self._remaining_restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        }
        environments = [
            shared | {
                "RANK": str(worker.global_rank), "WORLD_SIZE": str(worker.world_size),
                "LOCAL_RANK": str(worker.local_rank), "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            }
            for worker in worker_group.workers
        ]  # fmt: skip
        return dict(enumerate(self.ranks.start(environments)))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ranks = self.ranks
        if not ranks.ended():
            return RunResult(WorkerState.HEALTHY)
        if ranks.is_final():
            return RunResult(WorkerState.SUCCEEDED, return_values=dict(ranks.codes))
        if self._remaining_restarts:
            print(f"{ranks.account()}\nstarting all ranks again ({self._remaining_restarts} more time(s) at most)", file=sys.stderr)
        pids = [process.pid for process in ranks.processes]
        return RunResult(
            WorkerState.FAILED,
            failures={rank: ProcessFailure(rank, pids[rank], code, os.devnull) for rank, code in ranks.codes.items() if code},
        )

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self.ranks.stop()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.ranks.stop()
