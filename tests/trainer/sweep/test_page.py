"""report.html in a real browser: it opens from the disk without a network, and what can be done with it works."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.peers.many_runs import make_sweep, settings
from tests.thresholds import PAGE_MILLISECONDS
from trainer.sweep.found import find
from trainer.sweep.report import write
from trainer.sweep.verdict import judge

ARMS = [{"optimizer.lr": lr, "model.drop_rate": drop} for lr in (1e-4, 1e-3, 3e-3) for drop in (0.0, 0.2)]
FAILED, MISSING = 1, 8  # jobs: lr=0.0001 drop=0, seed 195; lr=0.001 drop=0, seed 335
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs a headless browser: apt-get install chromium (.ci/run does)")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep with a failed and a missing seed, and pictures of its first run."""
    home = make_sweep(tmp_path_factory.mktemp("page"), ARMS, states={FAILED: "failed", MISSING: "missing"})
    first = home.parents[3] / json.loads((home / "manifest.json").read_text())["jobs"][0]["directory"]
    for name in ("plots/loss.png", "previews/step-0000020/parts.png", "previews/step-0000110/parts.png"):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(first / name)
    write(judge(find([home])), home)
    return home / "report.html"


def ask(browser: str, page: Path, script: str, tmp_path: Path, *, seconds: float = 90.0) -> Any:
    """What `script`, the body of a function, returns in the page. The copy lies beside the page, where its links count from."""
    copy = page.with_name("asked.html")
    wrapped = f"try {{ document.documentElement.dataset.answer = JSON.stringify((() => {{ {script} }})()); }} catch (error) {{ document.documentElement.dataset.answer = JSON.stringify('' + error + error.stack); }}"
    copy.write_text(page.read_text().replace("</body>", f"<script>window.addEventListener('load', () => {{ {wrapped} }});</script></body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1360,1900", "--virtual-time-budget=3000", "--dump-dom", copy.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    found = re.search(r'data-answer="([^"]*)"', done.stdout)
    assert found, f"the page did not answer\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(found.group(1)))


TOOLS = """
const rows = () => [...document.querySelectorAll("tr.arm")].map(row => data.arms[+row.dataset.arm].label);
const type = text => { const box = $("filter"); box.value = text; box.dispatchEvent(new Event("input")); return rows(); };
const head = key => document.querySelector(`th[data-key="${key}"]`).click();
const inked = id => { const c = $(id), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; };
const sum = id => { const c = $(id), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) n = (n * 31 + d[i] + 7 * d[i + 1] + 13 * d[i + 2]) % 1000003; return n; };
const press = (id, kind, x, y) => $(id).dispatchEvent(Object.defineProperties(new PointerEvent(kind, { bubbles: true, pointerId: 1 }), { offsetX: { value: x }, offsetY: { value: y } }));
"""


def test_everything_in_it_can_be_used(browser: str, page: Path, tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
    const out = { ready: +document.documentElement.dataset.ready, title: document.title, chips: $("chips").textContent, remarks: [...$("remarks").querySelectorAll("li")].map(l => l.textContent) };
    out.byMean = rows();
    head("n"); out.byN = rows().map(l => data.arms.find(a => a.label === l).scores[0][0]);
    head("n"); out.byNDown = rows().map(l => data.arms.find(a => a.label === l).scores[0][0]);
    head("setting:optimizer.lr"); out.byRate = rows().map(l => data.arms.find(a => a.label === l).settings["optimizer.lr"]);
    head("rank");
    out.all = type(""); out.word = type("failed"); out.equal = type("lr=0.001"); out.above = type("lr>0.0005 drop_rate=0.2"); out.score = type("top1>97"); out.none = type("nonsense"); type("");
    out.curve = inked("curvecanvas"); out.parallel = inked("parallelcanvas"); out.legend = $("legend").children.length;
    const before = sum("curvecanvas"); $("curve").value = "val/loss"; $("curve").dispatchEvent(new Event("change")); out.otherCurve = sum("curvecanvas") !== before;
    const banded = sum("curvecanvas"); $("band").value = "runs"; $("band").dispatchEvent(new Event("change")); out.everySeed = sum("curvecanvas") !== banded;
    const linear = sum("curvecanvas"); $("log").click(); out.log = sum("curvecanvas") !== linear;
    press("curvecanvas", "pointermove", 600, 100); out.tip = $("tip").hidden ? "" : $("tip").textContent;
    const axis = axes.findIndex(a => a.name === "optimizer.lr");
    press("parallelcanvas", "pointerdown", place.X(axis), place.Y(0.9)); press("parallelcanvas", "pointermove", place.X(axis), place.Y(1)); out.brushed = rows();
    press("parallelcanvas", "pointerdown", place.X(axis), place.Y(0.2)); press("parallelcanvas", "pointerup", place.X(axis), place.Y(0.2)); out.released = rows().length;
    document.querySelector("tr.arm .swatch").click(); out.legendAfter = $("legend").children.length;
    head("setting:optimizer.lr"); document.querySelector("tr.arm").click();
    const detail = document.querySelector("tr.detail");
    out.links = [...detail.querySelectorAll("a")].map(a => a.getAttribute("href")); out.detail = detail.textContent;
    out.effects = [...$("effects").querySelectorAll("h3")].map(h => h.textContent);
    out.side = $("sidebyside").querySelectorAll("td.off").length; out.matrix = $("matrix").querySelectorAll("tbody td").length;
    $("metric").value = "1"; $("metric").dispatchEvent(new Event("change")); out.otherMetric = document.querySelector('th[data-key="rank"]').textContent;
    return out;"""
    )
    told = ask(browser, page, script, tmp_path)
    assert isinstance(told, dict), told
    assert told["title"] == "digits 2026-11-26_09-00-00"
    assert "16 completed" in told["chips"] and "1 failed" in told["chips"] and "1 missing" in told["chips"]
    assert any("seed 195 failed: Diverged" in text for text in told["remarks"]) and any(
        "seed 335 missing" in text for text in told["remarks"]
    )
    assert told["byMean"] == [row.arm.label for row in judge(find([page.parent])).ordered]
    assert told["byN"] == [2, 2, 3, 3, 3, 3] and told["byNDown"] == [3, 3, 3, 3, 2, 2]
    assert told["byRate"] == sorted(arm["optimizer.lr"] for arm in ARMS)
    assert len(told["all"]) == 6 and told["word"] == ["lr=0.0001 drop_rate=0"] and told["none"] == []
    assert {label.split()[0].removeprefix("lr=") for label in told["equal"]} == {"0.001"} and len(told["above"]) == 2
    assert 0 < len(told["score"]) < 6
    assert told["curve"] > 5000 and told["parallel"] > 3000 and told["legend"] == 6
    assert told["otherCurve"] and told["everySeed"] and told["log"]
    assert told["tip"].startswith("epoch ") and told["tip"].count("±") >= 5
    assert {label.split()[0].removeprefix("lr=") for label in told["brushed"]} == {"0.003"} and told["released"] == 6
    assert told["legendAfter"] == 5
    assert [link for link in told["links"] if link.endswith("/previews/step-0000110/parts.png")] and not [
        link for link in told["links"] if "step-0000020" in link
    ]
    for link in told["links"]:
        assert (page.parent / link).exists(), link
    assert "seed 42" in told["detail"] and "Diverged" in told["detail"]
    assert told["effects"] == ["optimizer.lr", "model.drop_rate"]
    assert told["side"] > 0 and told["matrix"] == 36
    assert told["otherMetric"].startswith("top5")


def test_it_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)", text), "no address"
    assert not re.search(r"<link|<iframe|@import|url\(|\bfetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text, "and the browser is told to load nothing"


def test_no_text_of_a_run_becomes_code(browser: str, tmp_path: Path) -> None:
    evil = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">/*DATA*/"
    home = make_sweep(tmp_path, [{"model.name": evil}, {"model.name": "'\"&amp;"}], states={1: "failed"})
    path = home.parents[3] / json.loads((home / "manifest.json").read_text())["jobs"][1]["directory"] / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reason": evil}))
    write(judge(find([home])), home)
    script = (
        TOOLS
        + """document.querySelector("tr.arm").click(); document.querySelectorAll("tr.arm")[1].click();
    return [document.title, document.querySelectorAll("img").length, rows(), $("remarks").textContent];"""
    )
    title, images, rows, remarks = ask(browser, home / "report.html", script, tmp_path)
    assert title == "digits 2026-11-26_09-00-00" and images == 0
    assert f"name={evil}" in rows and "name='\"&amp;" in rows and evil in remarks


def test_one_run_and_runs_without_results(browser: str, tmp_path: Path) -> None:
    home = make_sweep(tmp_path, [{}], seeds=[42])
    write(judge(find([home])), home)
    script = (
        TOOLS
        + 'return [rows(), $("settings").hidden, $("pairs").hidden, inked("curvecanvas") > 1000, document.querySelector(".badge") === null];'
    )
    assert ask(browser, home / "report.html", script, tmp_path) == [["the run as it is"], True, True, True, True]


def test_five_hundred_jobs_open_fast(browser: str, tmp_path: Path) -> None:
    home = make_sweep(tmp_path, settings(167), epochs=20)
    write(judge(find([home])), home)
    size = (home / "report.html").stat().st_size
    assert size < 4e6, f"{size / 1e6:.1f} MB"
    ready, rows = ask(
        browser,
        home / "report.html",
        "return [+document.documentElement.dataset.ready, document.querySelectorAll('tr.arm').length];",
        tmp_path,
    )
    assert rows == 167
    assert ready < PAGE_MILLISECONDS
