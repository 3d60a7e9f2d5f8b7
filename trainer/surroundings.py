"""What surrounds this process: torchrun, a SLURM step, a submitit job, or nothing. The only reader of `RANK`, `SLURM_PROCID` and their kin.

Knows environment variables, cores and visible GPUs; knows nothing of torch, so composing, validating and dispatching may ask.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DistributedError

if TYPE_CHECKING:
    from trainer.config.run import DistributedConfig

# Ports tried for the meeting of a SLURM step's ranks. Below 32768, where Linux starts to hand out ephemeral ports.
_FIRST_PORT, _NUM_PORTS, _PORTS_TRIED = 16000, 16000, 16
LAUNCHER_PID = "TRAINYARD_LAUNCHER"  # set by our own launcher for the ranks it starts


@dataclass(frozen=True)
class Surroundings:
    """This process among its ranks, before any of them has spoken to another."""

    launcher: str = ""  # "torchrun", "slurm", "submitit", or "" for a process on its own
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"  # host of rank 0
    store_port: int = 0  # of the ranks' key-value store, where a launcher has settled it
    agent_store: bool = False  # the launcher runs that store; otherwise rank 0 does
    ports: tuple[int, ...] = ()  # where rank 0 may listen, in the order tried, where nobody has settled it
    job: str = ""  # tells these ranks from a stranger's on the same port, and from those of an earlier attempt

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def surroundings(environment: Mapping[str, str] | None = None) -> Surroundings:
    """Read the environment. torchrun's variables win over SLURM's: torchrun may run inside a SLURM step, not the reverse."""
    env = os.environ if environment is None else environment
    if "RANK" in env:
        return _torchrun(env)
    # A batch script carries SLURM_NTASKS and SLURM_PROCID too, but only a step (srun) has one process per task.
    if "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_STEP_NODELIST" in env):
        return _slurm(env)
    if env.get("SUBMITIT_EXECUTOR") == "local":
        return _submitit(env)
    return Surroundings()


def _torchrun(env: Mapping[str, str]) -> Surroundings:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise DistributedError(
            f"RANK={rank} WORLD_SIZE={size}: a rank lies in 0 .. WORLD_SIZE - 1; start the ranks with torchrun, or unset RANK"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and name not in env:
            raise DistributedError(f"RANK and WORLD_SIZE are set but {name} is not; start the ranks with torchrun, or unset RANK")
    return Surroundings(
        "torchrun", rank, size, _number(env, "LOCAL_RANK", rank), _number(env, "LOCAL_WORLD_SIZE", 1 if "LOCAL_RANK" in env else size),
        address=env.get("MASTER_ADDR", "127.0.0.1"), store_port=_number(env, "MASTER_PORT", 0),
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        job="-".join(env.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT")),
    )  # fmt: skip


def _slurm(env: Mapping[str, str]) -> Surroundings:
    # The step's own count: SLURM_NTASKS is the job's where a step was started with fewer tasks.
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    hosts = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or socket.gethostname())
    per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    node = _number(env, "SLURM_NODEID", 0)
    # A requeued job keeps its id, so the restart count is part of its name.
    job = "-".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return Surroundings(
        "slurm", _number(env, "SLURM_PROCID"), size, _number(env, "SLURM_LOCALID", 0),
        per_node[node] if node < len(per_node) else 1,
        address="127.0.0.1" if len(hosts) == 1 else hosts[0], ports=_ports(job), job=job,
    )  # fmt: skip


def _submitit(env: Mapping[str, str]) -> Surroundings:
    """submitit's executor for this host. On a cluster submitit starts its tasks with srun, which is SLURM to us."""
    size, job = _number(env, "SUBMITIT_LOCAL_NTASKS", 1), env.get("SUBMITIT_LOCAL_JOB_ID", "0")
    return Surroundings(
        "submitit", _number(env, "SUBMITIT_LOCAL_GLOBALID", 0), size, _number(env, "SUBMITIT_LOCAL_LOCALID", 0), size, ports=_ports(job), job=job,
    )  # fmt: skip


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise DistributedError(f"environment variable {name}={text!r}: a whole number is needed to know this rank's place") from None


def _ports(job: str) -> tuple[int, ...]:
    """Ports every rank of a job works out alike, different for different jobs."""
    start = zlib.crc32(job.encode())
    return tuple(_FIRST_PORT + (start + 1009 * i) % _NUM_PORTS for i in range(_PORTS_TRIED))


def expand_nodelist(text: str) -> list[str]:
    """SLURM's compressed host list: "node[01-03,7],login1" -> node01 node02 node03 node7 login1."""
    hosts = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", entry):
            names = [name + part for name in names for part in ([plain] if plain else _expand_ranges(ranges))]
        hosts += names
    return hosts


def _expand_ranges(text: str) -> list[str]:
    numbers = []
    for entry in text.split(","):
        first, _, last = entry.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed counts: "2(x3),1" -> 2 2 2 1."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def ranks_to_start(distributed: DistributedConfig) -> int:
    """How many local ranks the dispatcher must start itself; 1 = train in this process."""
    here = surroundings()
    if here.size > 1 or here.launcher == "torchrun":
        return 1
    if distributed.processes is not None:
        return distributed.processes
    return max(1, visible_gpus())


def num_ranks(distributed: DistributedConfig) -> int:
    """How many ranks the run will have, seen from this process before it starts."""
    if _elsewhere:
        return _elsewhere[-1]
    return surroundings().size if surroundings().size > 1 else ranks_to_start(distributed)


_elsewhere: list[int] = []


@contextmanager
def as_if(ranks: int | None) -> Iterator[None]:
    """Within, `num_ranks` answers for a run that will start elsewhere with so many; None changes nothing."""
    if ranks is None:
        yield
        return
    _elsewhere.append(ranks)
    try:
        yield
    finally:
        _elsewhere.pop()


@lru_cache
def visible_gpus() -> int:
    """CUDA devices that torch would see here, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    if not _torch_has_cuda():
        return 0
    present = _gpus_present()
    if visible is None:
        return present
    # CUDA reads the list up to the first entry that is not valid.
    chosen = 0
    for entry in visible.split(","):
        if entry.strip().lstrip("-").isdigit() and not 0 <= int(entry) < present:
            break
        chosen += 1
    return chosen if present else 0


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")  # finds the folder; does not import it
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.exists() and re.search(r"^cuda\b[^=]*= *['\"]", version.read_text(), re.MULTILINE) is not None


def _gpus_present() -> int:
    """NVML's count, from the driver's own library: a few milliseconds, and no CUDA context."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint()
    found = count.value if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
    nvml.nvmlShutdown()
    return found


def job_end() -> float:
    """When SLURM will end this job, in seconds since 1970; infinite without a limit."""
    try:
        return float(os.environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return float("inf")


def usable_cores() -> int:
    """Cores this process may use: its affinity, and less where a container grants less time than that."""
    return max(1, int(min(len(os.sched_getaffinity(0)), granted_cores())))


def granted_cores() -> float:
    """Cores' worth of time that the container grants all its processes together; infinite without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def emulates_bf16() -> bool:
    """Whether bfloat16 on this CPU takes several times as long as fp32: oneDNN has no kernels for it on an x86 without AVX-512 (or
    AVX-NE-CONVERT). False where that cannot be told."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return False
    return "sse2" in flags and not {"avx512bw", "avx512vl", "avx512dq"} <= flags and "avx_ne_convert" not in flags


def die_with_parent() -> None:
    """Ask the kernel to end this process when the launcher that started it is gone. Nothing happens where it was started otherwise.

    To be called early: a launcher killed before this line would leave its rank behind, were it not for the second look below.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    end_with_parent()
    if os.getppid() != int(launcher):
        os._exit(1)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """This signal to this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG = 1)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)
