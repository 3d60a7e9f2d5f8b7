"""Shards that lie elsewhere, and shards read as streams."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import pickle
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from trainer.data.config import WebDatasetConfig
from trainer.data.shards import http as web
from trainer.data.shards.pack import pack
from trainer.data.shards.stream import StreamSource
from trainer.data.source import BadSample
from trainer.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small images in shards, each of a grey of its own, with classes.txt and _info.json."""
    import io

    from PIL import Image

    from trainer.data.config import ImageFolderConfig

    root = tmp_path_factory.mktemp("folders")
    for split, count in (("train", 30), ("val", 11)):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (4, 4), (i + 100 * c,) * 3).save(buffer, "PNG")
                (root / split / name / f"{i:02}.png").write_bytes(buffer.getvalue())
    config = ImageFolderConfig(path=str(root), image_size=4)
    out = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        pack(config.build(split), out, split, size=20_480)
    return out


GREYS = {"train": [*range(30), *range(100, 130)], "val": [*range(11), *range(100, 111)]}


def grey(sample: dict[str, Any]) -> int:
    value = sample["image"].getpixel((0, 0))[0]
    assert sample["label"] == value // 100
    return value


@pytest.fixture
def memory(packed: Path) -> Iterator[str]:
    """The shards in fsspec's file system in memory, which stands for every one that fsspec knows."""
    system = fsspec.filesystem("memory")
    for path in packed.iterdir():
        if path.is_file():
            system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """A web server of one folder that knows ranges, and fails as often as it is told to."""

    root: Path
    ranges = True
    failures = 0
    asked: list[tuple[str, str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        cls, path = type(self), self.root / self.path.lstrip("/")
        cls.asked.append((self.command, self.path))
        if cls.failures:
            cls.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and self.ranges:
            self.send_response(206)
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(web.time, "sleep", lambda seconds: None)
    Handler.root, Handler.ranges, Handler.failures, Handler.asked = packed, True, 0, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("where", ["memory", "server"])
def test_remote_shards_are_read_by_number(where: str, packed: Path, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(where)
    local = WebDatasetConfig(path=str(packed), image_size=4)
    count = len(local.shards("train").places)
    for way in (
        {"info": [f"{base}/_info.json"]},
        {"path": base},
        {
            "path": f"{base}/train-{{000000..{count - 1:06}}}.tar",
            "val_path": f"{base}/val-{{000000..000001}}.tar",
            "class_file": f"{base}/classes.txt",
        },
    ):
        config = WebDatasetConfig(image_size=4, **way)  # type: ignore[arg-type]
        assert not list(config.problems())
        source = pickle.loads(pickle.dumps(config.build("train")))
        assert [grey(source[i]) for i in range(60)] == GREYS["train"]
        assert source.classes == ("cat", "dog") and source.encoded(7) == local.build("train").encoded(7)  # type: ignore[attr-defined]


def test_an_index_of_remote_shards_is_fetched_in_large_pieces_and_once(server: str) -> None:
    config = WebDatasetConfig(path=server, image_size=4)
    assert not list(config.problems())
    config.build("train")
    fetched = [path for method, path in Handler.asked if method == "GET" and path.endswith(".tar")]
    assert max(Counter(fetched).values(), default=0) <= 1  # each shard is smaller than a piece; none where it was indexed before
    Handler.asked.clear()
    config.build("train")
    assert not [path for method, path in Handler.asked if method == "GET" and path.endswith(".tar")]


def test_servers_that_stumble_are_asked_again_and_those_that_cannot_are_told_of(server: str) -> None:
    Handler.failures = 1
    assert not list(WebDatasetConfig(info=[f"{server}/_info.json"], image_size=4).problems())
    (problem,) = WebDatasetConfig(info=[f"{server}/nope.json"], image_size=4).problems()
    assert problem.key == "dataset.info" and "HTTP 404" in problem.reason
    (problem,) = WebDatasetConfig(path=f"{server}/elsewhere", image_size=4).problems()
    assert "remote folders are not listed" in problem.reason and "_info.json" in problem.fix
    source = WebDatasetConfig(path=server, image_size=4).build("train")
    Handler.ranges = False
    with pytest.raises(BadSample, match=r"dataset\.streaming=true"):
        source[0]
    Handler.failures = 100
    with pytest.raises(BadSample, match="HTTP 503"):
        source[0]


def streaming(packed: Path, **more: Any) -> WebDatasetConfig:
    return WebDatasetConfig(path=str(packed), image_size=4, streaming=True, shuffle_buffer=20, **more)


@pytest.mark.parametrize("where", ["packed", "memory", "server"])
def test_a_stream_gives_every_sample_once_an_epoch(where: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> None:
    config = streaming(request.getfixturevalue(where))
    assert not list(config.problems())
    source = config.build("train")
    assert isinstance(source, StreamSource) and len(source) == 60 and source.labels() is None
    source.divide(0, 1, 0)
    assert "not exactly resumable" in caplog.text
    first, second = ([grey(source[i]) for i in range(60)] for _ in range(2))
    assert sorted(first) == sorted(second) == GREYS["train"]
    assert first != second and first != sorted(first)
    val = config.build("val")
    for _ in range(2):
        assert [grey(val[i]) for i in range(22)] == GREYS["val"]
    assert [grey(val[i]) for i in range(1, 22, 2)] == GREYS["val"][1::2]  # a share of it


def test_ranks_and_workers_divide_a_stream_and_none_runs_dry(packed: Path) -> None:
    """Two ranks of two forked readers each, each asking for as much as the others."""
    context = multiprocessing.get_context("fork")
    shards = len(WebDatasetConfig(path=str(packed), image_size=4).shards("train").places)
    assert shards >= 4
    seen: list[list[int]] = []
    for rank in range(2):
        source = streaming(packed).build("train")
        assert isinstance(source, StreamSource)
        source.divide(rank, 2, 2)
        for _ in range(2):
            mine, yours = context.Pipe(duplex=False)

            def read(pipe: Any, source: StreamSource = source) -> None:
                pipe.send([grey(source[0]) for _ in range(40)])

            process = context.Process(target=read, args=(yours,))
            process.start()
            seen.append(mine.recv())
            process.join()
    assert all(len(greys) == 40 for greys in seen)  # more than any of them has in an epoch: it began the next one
    least = min(json.loads((packed / "_info.json").read_text())["splits"]["train"]["shard_lengths"])
    first = [grey for greys in seen for grey in greys[:least]]  # surely of the first epoch
    assert least > 3 and len(set(first)) == 4 * least  # nobody reads what another reads


def test_fewer_shards_than_readers_is_a_configuration_error(packed: Path) -> None:
    source = streaming(packed).build("train")
    assert isinstance(source, StreamSource)
    with pytest.raises(ConfigError, match=r"dataset.num_workers=8: 2 ranks x 8 readers are more than the \d+ training shards"):
        source.divide(0, 2, 8)


def test_a_stream_without_info_needs_its_size(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        if path.is_file() and path.name != "_info.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert [p.key for p in streaming(tmp_path).problems()] == ["dataset.train_size", "dataset.val_size"]
    config = streaming(tmp_path, train_size=50, val_size=22)
    assert not list(config.problems()) and len(config.build("train")) == 50
    config.val_size = 30
    val = config.build("val")
    with pytest.raises(DataError, match=r"end after 22 samples, but 30 are announced: dataset\.val_size=22"):
        [val[i] for i in range(30)]


def test_a_cut_shard_in_a_stream_is_noticed_where_the_info_tells_its_length(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[:6000])
    source = streaming(tmp_path).build("train")
    bad: list[str] = []
    good = 0
    for i in range(50):
        try:
            grey(source[i])
            good += 1
        except BadSample as error:
            bad.append(str(error))
    assert good > 40 and bad and all("train-000001.tar" in text and re.search(r"cut short|ends after", text) for text in bad)


def test_bad_samples_of_a_stream_are_named(packed: Path, tmp_path: Path) -> None:
    import io
    import tarfile

    (tmp_path / "classes.txt").write_text("cat\n")
    files = {"a.png": b"no image", "a.cls": b"0", "b.txt": b"x", "c.png": b"", "c.cls": b"0"}
    for name in ("train-0.tar", "val-0.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data in files.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    val = streaming(tmp_path, train_size=3, val_size=3).build("val")
    for i, why in enumerate(("not an image", "has no image; its files end in txt", "0 bytes")):
        with pytest.raises(BadSample, match=why) as error:
            val[i]
        assert f"val-0.tar:{'abc'[i]}" in error.value.name


def test_a_class_beyond_the_class_file_is_a_bad_sample_of_a_stream(packed: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\n")
    source = streaming(packed, class_file=str(names)).build("val")
    assert source[0]["label"] == 0
    with pytest.raises(BadSample, match="is of class 1, but the class file names 1"):
        source[21]


def test_streams_pickle_and_info_of_splits_stays_as_it_was(packed: Path) -> None:
    source = streaming(packed).build("train")
    again = pickle.loads(pickle.dumps(source))
    assert sorted(grey(again[i]) for i in range(60)) == GREYS["train"]
    assert set(json.loads((packed / "_info.json").read_text())["splits"]) == {"train", "val"}


def test_a_stream_of_nothing_ends_instead_of_searching_for_ever(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "classes.txt").write_text("cat\n")
    for name in ("train-0.tar", "val-0.tar"):
        tarfile.open(tmp_path / name, "w").close()
    config = streaming(tmp_path, train_size=3, val_size=3)
    with pytest.raises(DataError, match=r"no sample in .*train-0\.tar"):
        config.build("train")[0]
    with pytest.raises(DataError, match="end after 0 samples"):
        config.build("val")[0]
