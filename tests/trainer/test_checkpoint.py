"""A checkpoint is whole or not there: whatever is done to the writer, the disk or the file, a good state can be loaded or an error says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer.checkpoint import CheckpointError, Snapshot, Writer, load, newest_good, save_safetensors
from trainer.checkpoint.publish import sidecar_path
from trainer.checkpoint.snapshot import copy_in_two
from trainer.errors import StorageError
from trainer.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]


def state_at(step: int, size: int = 1000) -> dict:
    """A state that can be checked: every number in it is its step."""
    return {
        "step": step,
        "task": {f"w{i}": torch.full((size,), float(step)) for i in range(3)},
        "optimizers": [{"state": {0: {"step": torch.tensor(float(step))}}}],
    }


def is_whole(state: dict) -> bool:
    return (
        all(bool((w == state["step"]).all()) for w in state["task"].values())
        and state["optimizers"][0]["state"][0]["step"] == state["step"]
    )


def saved(directory: Path, *steps: int, names: tuple[str, ...] = ("last",), keep: int = 1) -> Path:
    with Writer(directory, keep=keep) as writer:
        for step in steps:
            writer.save(state_at(step), [name.format(step) for name in names])
    return directory / "last.pt"


def names_in(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


class TestRoundTrip:
    def test_kinds_of_tensors(self, tmp_path):
        image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        state: dict[str, Any] = {
            "float32": torch.randn(3, 4),
            "bfloat16": torch.randn(5).bfloat16(),
            "float16": torch.randn(5).half(),
            "float64": torch.randn(1).double(),
            "int64": torch.tensor([-(2**62), 2**62]),
            "uint8": torch.arange(256, dtype=torch.uint8),
            "bool": torch.tensor([True, False]),
            "complex": torch.randn(3, dtype=torch.complex64),
            "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 7),
            "transposed": torch.randn(3, 4).t(),
            "strided": torch.arange(20.0)[::3],
            "channels_last": image,
            "expanded": torch.randn(1, 3).expand(4, 3),
            "parameter": nn.Parameter(torch.randn(2)),
            "grown": torch.randn(4, requires_grad=True) * 2,
            "cut from something large": torch.zeros(1_000_000)[10:12],
            "nested": [1, 2.5, None, True, "text", (1, {"deep": torch.ones(1)}), OrderedDict(a=1)],
            "numpy": np.float64(0.25),
            "integer keys": {7: -1},
        }
        with Writer(tmp_path) as writer:
            writer.save(state, ["last"])
        loaded = load(tmp_path / "last.pt")
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
                assert type(loaded[name]) is torch.Tensor and not loaded[name].requires_grad
        assert loaded["channels_last"].is_contiguous(memory_format=torch.channels_last)
        assert loaded["nested"][:5] == [1, 2.5, None, True, "text"] and isinstance(loaded["nested"][5], tuple)
        assert loaded["nested"][5][1]["deep"] == 1 and loaded["nested"][6] == {"a": 1} and loaded["numpy"] == 0.25
        assert loaded["integer keys"] == {7: -1} and list(loaded) == list(state)
        assert (tmp_path / "last.pt").stat().st_size < 100_000  # not the megabytes behind a view

    def test_tied_weights_stay_tied(self, tmp_path):
        flat = torch.arange(10.0)
        with Writer(tmp_path) as writer:
            writer.save({"a": flat, "b": flat, "left": flat[:5], "other": flat.clone()}, ["last"])
            writer.save({"a": flat, "bits": flat.view(torch.int32)}, ["types"])
        loaded = load(tmp_path / "last.pt")
        loaded["a"][0] = 99
        assert loaded["b"][0] == 99 and loaded["left"][0] == 99 and loaded["other"][0] == 0
        assert torch.equal(load(tmp_path / "types.pt")["bits"], flat.view(torch.int32))  # shared no more, but right

    def test_a_real_training_state(self, tmp_path):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
        for optimizer in (torch.optim.AdamW(net.parameters()), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)):
            net(torch.randn(2, 3, 8, 8)).sum().backward()
            optimizer.step()
            state = {"task": net.state_dict(), "optimizers": [optimizer.state_dict()]}
            with Writer(tmp_path) as writer:
                writer.save(state, ["last"])
            loaded = load(tmp_path / "last.pt")
            other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
            other.load_state_dict(loaded["task"])
            fresh = type(optimizer)(other.parameters(), lr=0.1)
            fresh.load_state_dict(loaded["optimizers"][0])
            torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
            torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("thing", [Path("x"), {1, 2}, np.zeros(3), object(), torch.nn.Linear(1, 1)])
    def test_what_could_not_be_loaded_is_not_saved(self, tmp_path, thing):
        with Writer(tmp_path) as writer, pytest.raises(TypeError, match=r"checkpoint\['a'\]\[1\]"):
            writer.save({"a": [0, thing]}, ["last"])

    def test_safetensors(self, tmp_path):
        from safetensors import safe_open

        net = nn.ModuleDict(
            {
                "a": nn.Linear(3, 3, bias=False),
                "b": nn.Linear(3, 3, bias=False),
                "c": nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last),
            }
        )
        net["b"].weight = net["a"].weight  # tied
        save_safetensors(net, tmp_path / "model.safetensors", {"classes": json.dumps(["cat"])})
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert {k: file.get_tensor(k).shape for k in file.keys()} == {k: v.shape for k, v in net.state_dict().items()}  # noqa: SIM118
            assert all(torch.equal(file.get_tensor(k), v) for k, v in net.state_dict().items())
            assert json.loads(file.metadata()["classes"]) == ["cat"]
        assert sidecar_path(tmp_path / "model.safetensors").read_text().split()[0] == sha256_of(tmp_path / "model.safetensors")
        assert names_in(tmp_path) == {"model.safetensors", "model.safetensors.sha256"}


class TestSnapshot:
    def test_training_may_change_the_state_as_soon_as_save_returns(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRAINYARD_CHECKPOINT_FAULT", "write:0.05:1")
        state = state_at(1, size=100_000)
        with Writer(tmp_path) as writer:
            writer.save(state, ["last"])
            for tensor in state["task"].values():
                tensor.fill_(-1)
            state["optimizers"][0]["state"][0]["step"].fill_(-1)
            state["step"] = 2
        assert load(tmp_path / "last.pt")["step"] == 1 and is_whole(load(tmp_path / "last.pt"))

    @pytest.mark.parametrize("sizes", [[6_000_000], [1, 3_000_000, 2_999_999, 7], [0, 5_000_000, 0]])
    def test_a_large_state_is_copied_whole_whichever_thread_copies_what(self, sizes):
        state = {str(i): torch.rand(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)}
        snapshot = Snapshot()
        for _ in range(2):  # the second time into memory that is there already
            copied = snapshot.take(state)
            assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())
            for tensor in state.values():
                tensor += 1

    def test_what_goes_wrong_in_the_thread_that_copies_is_told(self):
        sources = [torch.zeros(3_000_000), torch.zeros(3_000_000)]
        with pytest.raises(RuntimeError, match="size"):
            copy_in_two([(torch.zeros(3_000_000), sources[0]), (torch.zeros(2_999_999), sources[1])])

    def test_memory_is_used_again(self):
        snapshot = Snapshot()
        first = snapshot.take(state_at(1))
        addresses = [t.data_ptr() for t in first["task"].values()]
        size = snapshot.size
        second = snapshot.take(state_at(2))
        assert [t.data_ptr() for t in second["task"].values()] == addresses and snapshot.size == size
        assert is_whole(second)

    def test_a_state_that_grows_is_followed(self, tmp_path):
        """An optimizer's state appears with its first step; a history gets longer."""
        with Writer(tmp_path) as writer:
            for step in range(1, 4):
                state = state_at(step, size=1000 * step)
                state["more"] = {f"m{i}": torch.full((i,), float(step)) for i in range(step)}
                writer.save(state, ["last"])
                writer.wait()
                loaded = load(tmp_path / "last.pt")
                assert is_whole(loaded) and len(loaded["more"]) == step

    def test_prepare_sets_the_memory_aside_in_the_background(self, tmp_path):
        with Writer(tmp_path) as writer:
            writer.prepare(state_at(1, size=100_000))
            writer.wait()
            size = writer._snapshot.size
            assert size >= 3 * 400_000
            writer.save(state_at(1, size=100_000), ["last"])
            assert writer._snapshot.size == size


class TestNames:
    def test_one_state_under_several_names_costs_one(self, tmp_path):
        with Writer(tmp_path) as writer:
            writer.save(state_at(7), ["last", "best", "epoch-0001"])
        assert len({(tmp_path / f"{n}.pt").stat().st_ino for n in ("last", "best", "epoch-0001")}) == 1
        assert names_in(tmp_path) == {f"{n}.pt{s}" for n in ("last", "best", "epoch-0001") for s in ("", ".sha256")}

    def test_sidecars_are_what_sha256sum_checks(self, tmp_path):
        saved(tmp_path, 1, 2, names=("last", "best"))
        done = subprocess.run(
            ["sha256sum", "-c", *(p.name for p in tmp_path.glob("*.sha256"))], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.count("OK") == 3, done.stderr

    def test_the_previous_one_stays(self, tmp_path):
        saved(tmp_path, 1, 2, 3)
        assert load(tmp_path / "last.pt")["step"] == 3 and load(tmp_path / "previous.pt")["step"] == 2

    def test_best_is_not_touched_by_later_ones(self, tmp_path):
        with Writer(tmp_path) as writer:
            writer.save(state_at(1), ["last", "best"])
            writer.save(state_at(2), ["last"])
            writer.save(state_at(3), ["last"])
        assert load(tmp_path / "best.pt")["step"] == 1

    @pytest.mark.parametrize("keep", [0, 1, 3])
    def test_only_the_newest_numbered_ones_stay(self, tmp_path, keep):
        saved(tmp_path, *range(1, 13), names=("last", "epoch-{:04d}"), keep=keep)
        left = sorted(p.name for p in tmp_path.glob("epoch-*.pt"))
        assert left == [f"epoch-{n:04d}.pt" for n in range(13 - keep, 13)]
        assert {p.name for p in tmp_path.glob("epoch-*.sha256")} == {f"{n}.sha256" for n in left}

    def test_without_hard_links_it_copies(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links")))
        saved(tmp_path, 1, 2, names=("last", "best"))
        assert load(tmp_path / "last.pt")["step"] == load(tmp_path / "best.pt")["step"] == 2
        assert (tmp_path / "last.pt").stat().st_ino != (tmp_path / "best.pt").stat().st_ino

    def test_leftovers_of_a_killed_writer_are_cleared_away(self, tmp_path):
        (tmp_path / ".last.pt.host-1-0.partial").write_bytes(b"x" * 100)
        saved(tmp_path, 1)
        assert not list(tmp_path.glob(".*"))

    def test_forget_previous(self, tmp_path):
        with Writer(tmp_path) as writer:
            writer.save(state_at(1), ["last"])
            writer.save(state_at(2), ["last"])
            writer.forget_previous()
        assert names_in(tmp_path) == {"last.pt", "last.pt.sha256"}


def flip_a_bit(path: Path) -> None:
    """In place, so that other hard links of the file are hit too, as by a bad sector. In the middle: inside the weights."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def wrong_sum(path: Path) -> None:
    sidecar_path(path).write_text(f"{'0' * 64}  {path.name}\n")


def delete(path: Path) -> None:
    path.unlink()


def replace_by_text(path: Path) -> None:
    path.write_text("not a checkpoint at all")
    sidecar_path(path).unlink()


def flip_without_sum(path: Path) -> None:
    flip_a_bit(path)
    sidecar_path(path).unlink()


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_MARK']}",)


def replace_by_code(path: Path) -> None:
    torch.save({"step": 9, "task": Evil()}, path)
    sidecar_path(path).write_text(f"{sha256_of(path)}  {path.name}\n")  # an attacker can hash too


def replace_by_bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"step": 9, "task": Evil()}))
    sidecar_path(path).unlink()


DAMAGES = [flip_a_bit, truncate, empty, wrong_sum, delete, replace_by_text, flip_without_sum, replace_by_code, replace_by_bare_pickle]


class TestDamage:
    @pytest.fixture(autouse=True)
    def _mark(self, tmp_path, monkeypatch):
        monkeypatch.setenv("EVIL_MARK", str(tmp_path / "evil"))
        yield
        assert not (tmp_path / "evil").exists(), "code from a checkpoint was run"

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_bad_file_is_refused_and_the_one_before_it_used_aloud(self, tmp_path, damage, caplog):
        path = saved(tmp_path / "c", 1, 2, names=("last", "epoch-{:04d}"))
        damage(path)
        found = newest_good(tmp_path / "c")
        assert found is not None
        # A deleted name loses nothing: the same checkpoint has another one.
        expected = {delete: 1, wrong_sum: 1}.get(damage, 1)
        assert found[1]["step"] == expected and is_whole(found[1])
        if damage is not delete:
            assert "last.pt" in caplog.text and found[0].name in caplog.text
            with pytest.raises(CheckpointError) as refused:
                load(path)
            assert str(path) in str(refused.value) and refused.value.exit_code == 5

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_where_none_is_good_it_says_what_to_do(self, tmp_path, damage):
        path = saved(tmp_path / "c", 1)
        damage(path)
        if damage is delete:
            assert newest_good(tmp_path / "c") is None
            return
        with pytest.raises(StorageError, match="resume=never"):
            newest_good(tmp_path / "c")

    def test_the_newest_of_what_is_left_is_chosen(self, tmp_path):
        path = saved(tmp_path, 1, 2, 3, 4, names=("last", "epoch-{:04d}"), keep=3)
        with Writer(tmp_path) as writer:
            writer.save(state_at(5), ["last"])
        flip_a_bit(path)
        (tmp_path / "previous.pt").unlink()
        found = newest_good(tmp_path)
        assert found is not None and found[1]["step"] == 4 and found[0].name == "epoch-0004.pt"

    def test_no_checkpoint_is_no_error(self, tmp_path):
        assert newest_good(tmp_path) is None and newest_good(tmp_path / "nothing here") is None
        with pytest.raises(CheckpointError, match="no such file"):
            load(tmp_path / "last.pt")

    def test_a_lone_file_without_its_sum_is_enough(self, tmp_path):
        path = saved(tmp_path / "c", 4)
        shutil.copy(path, tmp_path / "alone.pt")
        assert load(tmp_path / "alone.pt")["step"] == 4

    def test_every_single_bit_counts(self, tmp_path):
        path = saved(tmp_path / "c", 4)
        whole = path.read_bytes()
        generator = random.Random(0)
        for _ in range(40):
            at, bit = generator.randrange(len(whole)), generator.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match="changed"):
                load(path)


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from trainer.checkpoint import Writer, newest_good
from tests.trainer.test_checkpoint import state_at, is_whole
directory = Path({directory!r})
found = newest_good(directory)
first = found[1]["step"] if found else 0
assert found is None or is_whole(found[1])
with Writer(directory) as writer:
    print("ready", flush=True)
    for step in range(first + 1, first + {count} + 1):
        writer.save(state_at(step, {size}), ["last", f"epoch-{{step:04d}}"] + ["best"] * (step % 2))
        writer.wait()
        print(step, flush=True)
"""


def start_writer(directory: Path, *, count: int, size: int = 1000, fault: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {"TRAINYARD_CHECKPOINT_FAULT": fault, "OMP_NUM_THREADS": "1"}
    code = WRITER.format(root=str(ROOT), directory=str(directory), count=count, size=size)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


POINTS = ["write", "sync", "verify", "previous", "sidecar", "rename", "prune"]


class TestKilled:
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on
    @pytest.mark.parametrize("point", POINTS)
    def test_at_every_point(self, tmp_path, point, monkeypatch):
        """Every passing of every point while the third checkpoint is written: two good ones came before."""
        import trainer.checkpoint.faults as faults

        directory = tmp_path / "c"
        # Every tensor is several writes, each like the next.
        for nth in (1, 2, 4, 8, 16, 32, 64) if point == "write" else range(1, 100):
            shutil.rmtree(directory, ignore_errors=True)
            saved(directory, 1, 2, names=("last", "best", "epoch-{:04d}"))
            child = os.fork()
            if child == 0:  # torch is loaded already; the child only writes and dies
                os.environ["TRAINYARD_CHECKPOINT_FAULT"] = f"{point}:kill:{nth}"
                faults._passings.clear()
                with contextlib.suppress(BaseException), Writer(directory) as writer:
                    writer.save(state_at(3), ["last", "best", "epoch-0003"])
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = newest_good(directory)
            assert found is not None and found[1]["step"] in (2, 3) and is_whole(found[1])
            for path in directory.glob("*.pt"):  # and nothing that has a name is torn
                assert is_whole(load(path)), path
            if not os.WIFSIGNALED(status):
                assert nth > 1 and found[1]["step"] == 3, "the fault never struck"
                return
            saved(directory, 4)  # the next start clears up and goes on
            assert load(directory / "last.pt")["step"] == 4 and not list(directory.glob(".*"))
        raise AssertionError("more passings than there can be")

    def test_at_random_moments(self, tmp_path):
        """A writer in its own process, killed again and again: what it said was saved is never lost."""
        generator = random.Random(0)
        acknowledged, interrupted = 0, 0
        for attempt in range(20):  # enough that a slow machine is hit in the middle of a write, too
            child = start_writer(tmp_path, count=10_000, size=200_000)
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            if attempt % 2:
                acknowledged = int(child.stdout.readline())
            lines: list[str] = []
            reader = threading.Thread(target=lambda out=child.stdout, lines=lines: lines.extend(out))
            reader.start()
            time.sleep(generator.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
            child.wait()
            reader.join()
            child.stdout.close()
            acknowledged = max([acknowledged, *(int(line) for line in lines if line.endswith("\n"))])
            interrupted += bool(list(tmp_path.glob(".*.partial")))
            found = newest_good(tmp_path)
            if found is None:
                assert acknowledged == 0
            else:
                assert is_whole(found[1])
                assert found[1]["step"] >= acknowledged
            if attempt >= 4 and interrupted >= 2:
                break
        assert interrupted, "no kill hit a write"
        assert acknowledged


@pytest.fixture
def tiny_disk(tmp_path):
    """A filesystem of 1 MB."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


class TestDisk:
    def expect_refusal(self, directory: Path, what: str) -> None:
        """The first checkpoint fits, the second does not: it fails, the first stays, nothing is left lying about."""
        with Writer(directory) as writer:
            writer.save(state_at(1, 1000), ["last"])
            writer.wait()
            writer.save(state_at(2, 400_000), ["last"])
            with pytest.raises(StorageError, match=what) as refused:
                writer.save(state_at(3, 1000), ["last"])
            assert refused.value.exit_code == 5 and "intact" in str(refused.value)
            found = newest_good(directory)
            assert found is not None and found[1]["step"] == 1
            assert not list(directory.glob(".*"))
            writer.save(state_at(4, 1000), ["last"])  # and when there is room again, it goes on
        assert load(directory / "last.pt")["step"] == 4

    def test_full(self, tiny_disk):
        self.expect_refusal(tiny_disk / "c", "disk is full")

    def test_full_at_the_sidecar(self, tmp_path, monkeypatch):
        import trainer.checkpoint.publish as publish

        saved(tmp_path, 1)

        def full(*_, **__):
            raise StorageError("cannot write x.sha256: the disk is full")

        monkeypatch.setattr(publish, "write_atomically", full)
        with pytest.raises(StorageError, match="intact"):
            saved(tmp_path, 2)
        assert load(tmp_path / "last.pt")["step"] == 1 and not list(tmp_path.glob(".*"))

    def test_file_size_limit(self, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # Python ignores the signal, so that write() fails with EFBIG
        try:
            self.expect_refusal(tmp_path / "c", "larger than allowed")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_read_only(self, tiny_disk):
        saved(tiny_disk / "c", 1)
        with Writer(tiny_disk / "c") as writer:
            subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
            writer.save(state_at(2), ["last"])
            with pytest.raises(StorageError, match="read-only"):
                writer.wait()
        with pytest.raises(StorageError, match="read-only"):  # and at the start of the next run, before any training
            Writer(tiny_disk / "c")
        assert load(tiny_disk / "c" / "last.pt")["step"] == 1

    def test_a_place_that_cannot_be(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="a file stands where"):
            Writer(tmp_path / "file" / "checkpoints")

    def test_a_disk_that_lies(self, tmp_path, monkeypatch):
        import trainer.checkpoint.writer as module

        saved(tmp_path, 1)
        monkeypatch.setattr(module, "sha256_of", lambda *_, **__: "0" * 64)
        with pytest.raises(StorageError, match="does not give back"):
            saved(tmp_path, 2)
        assert load(tmp_path / "last.pt")["step"] == 1


class TestWriter:
    def test_an_error_on_the_way_out_does_not_hide_the_first(self, tmp_path, monkeypatch, caplog):
        import trainer.checkpoint.writer as module

        monkeypatch.setattr(module, "sha256_of", lambda *_, **__: "0" * 64)

        def failing_run():
            with Writer(tmp_path) as writer:
                writer.save(state_at(1), ["last"])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            failing_run()
        assert "does not give back" in caplog.text

    def test_save_waits_for_the_one_before(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRAINYARD_CHECKPOINT_FAULT", "sync:0.2")
        with Writer(tmp_path) as writer:
            writer.save(state_at(1), ["last"])
            quick = writer.stall_seconds
            writer.save(state_at(2), ["last"])
            assert quick < 0.1 < writer.stall_seconds
        assert load(tmp_path / "last.pt")["step"] == 2 and load(tmp_path / "previous.pt")["step"] == 1
        assert writer.save_seconds > 0.2

    def test_training_goes_on_while_it_writes(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRAINYARD_CHECKPOINT_FAULT", "sync:0.5")
        with Writer(tmp_path) as writer:
            started = time.perf_counter()
            writer.save(state_at(1), ["last"])
            assert time.perf_counter() - started < 0.25
            assert not (tmp_path / "last.pt").exists()
        assert (tmp_path / "last.pt").exists()

    def test_no_thread_stays_behind(self, tmp_path):
        before = threading.active_count()
        saved(tmp_path, 1)
        assert threading.active_count() == before
