"""The page in a real Chromium: drawn, hovered, zoomed, dark, compared, followed; quiet, and alone with its file."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.run.evaluations import append_evaluation
from pretrain.run.folder import RunFolder
from tests.tools.report.browser import Browser, missing
from tests.tools.report.ladder_world import make_ladder
from tests.tools.report.test_report import HOSTILE, spoil
from tests.tools.report.world import add_rows, make_run
from tools import cli
from tools.ladder import scaling
from tools.report.cli import LadderReaders, RunReaders
from tools.report.plan_pages import write_coordinates_page, write_rehearsal_page
from tools.report.serve import LiveDocument, PageServer


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if why := missing():
        # Set by .ci/run: there, what is missing is a failure.
        if os.environ.get("PHALANX_REQUIRE_SLURM"):
            pytest.fail(why)
        pytest.skip(why)
    found = Browser()
    yield found
    found.close()


def page_of(path: Path, *runs: Path) -> Path:
    assert cli.run(["report", *map(str, runs), "--out", str(path)]) == 0
    return path


def quiet(browser: Browser, *hosts: str) -> None:
    """Nothing on the console, and no host was asked but these."""
    assert browser.errors() == []
    assert browser.hosts <= {"", *hosts}, browser.hosts


SECTIONS = "return [...document.querySelectorAll('nav a')].map((one) => one.textContent)"
TITLES = "return [...document.querySelectorAll('#curves h3')].map((one) => one.textContent)"
RANGES = "return [...document.querySelectorAll('#curves .plot')].map((box) => box.layout.xaxis.range.map(Math.round))"


def test_a_run_is_drawn_hovered_zoomed_and_dark(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(tmp_path / "page.html", make_run(tmp_path / "run").path))
    titles = browser.run(TITLES)
    assert titles[:3] == ["Loss (nats a token)", "Validation loss (nats a token)", "Gradient norm (before clipping)"]
    assert "Peak memory by stage (GiB)" in titles and "Router and prediction losses" in titles
    # Drawn: lines in each panel, both heat maps, the timeline and the plan.
    assert browser.run(
        "return [...document.querySelectorAll('#curves .plot')].every((box) => box.querySelector('.js-line, .point'))"
    )
    assert browser.run("return document.querySelectorAll('#experts .heatmaplayer image').length") == 2
    assert browser.run("return document.querySelectorAll('#life .barlayer .point').length") >= 4
    assert browser.run("return document.querySelectorAll('#layout .barlayer .point').length") >= 10
    assert "attempt 2 begins with step 21" not in browser.run("return document.body.innerText")
    # Hover: exact values at step 7.
    browser.run("Plotly.Fx.hover(document.querySelector('#curves .plot'), [{ curveNumber: 0, pointNumber: 6 }])")
    text = browser.wait("return document.querySelector('#curves .hoverlayer').textContent")
    assert "step 7" in text and "7.543" in text
    # Zoom is shared, by the buttons and by a drag in one panel.
    browser.run("document.querySelector('[aria-label=\"Zoom in\"]').click()")
    browser.wait(f"const found = (() => {{ {RANGES} }})(); return found.every((one) => one[0] === found[0][0] && one[0] >= 8)")
    browser.run("Plotly.relayout(document.querySelectorAll('#curves .plot')[2], { 'xaxis.range[0]': 10, 'xaxis.range[1]': 20 })")
    browser.wait(f"const found = (() => {{ {RANGES} }})(); return found.every((one) => one[0] === 10 && one[1] === 20)")
    browser.run("document.querySelector('[aria-label=\"Show all\"]').click()")
    browser.wait(f"const found = (() => {{ {RANGES} }})(); return found.every((one) => one[1] >= 40)")
    # Axes.
    for value, title in (("tokens", "tokens"), ("time", "hours in steps")):
        browser.run(f"const one = document.getElementById('axis'); one.value = '{value}'; one.dispatchEvent(new Event('change'))")
        browser.wait(f"return document.querySelector('#curves .plot').layout.xaxis.title.text === '{title}'")
    assert browser.run("return document.querySelector('#curves .plot').data[0].x.at(-1)") == pytest.approx(40 * 0.5 / 3600)
    browser.run("document.getElementById('log').click()")
    browser.wait("return document.querySelector('#curves .plot').layout.yaxis.type === 'log'")
    # Theme.
    before = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click(); document.getElementById('theme').click()")
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != before
    assert browser.run("return document.querySelector('#curves .plot').layout.font.color") == "#e4e8f0"
    quiet(browser)


def test_a_phone_and_a_screen_reader_have_everything(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(tmp_path / "page.html", make_run(tmp_path / "run").path), 390, 844, "dark", phone=True)
    assert browser.run("return document.documentElement.scrollWidth <= 390")
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    unnamed = "return [...document.querySelectorAll('button, select, input, [role=img]')].filter((one) => " \
              "!one.getAttribute('aria-label') && !one.closest('label') && !one.textContent.trim()).length"  # fmt: skip
    assert browser.run(unnamed) == 0
    label = browser.run("return document.querySelector('#curves .plot').getAttribute('aria-label')")
    assert label.startswith("Loss by step. loss: from 8.771 to 3.845")
    browser.run("document.querySelector('#curves details summary').click()")
    assert browser.wait("return document.querySelectorAll('#curves details table tbody tr').length") == 21
    quiet(browser)


def test_runs_are_compared(browser: Browser, tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "two", 30, "optimizer.lr=0.5")
    browser.open(page_of(tmp_path / "page.html", one.path, other.path))
    text = browser.run("return document.getElementById('compare').innerText")
    assert "optimizer.lr" in text and "0.5" in text and "one" in text and "two" in text
    # Raw and smoothed, of both.
    names = browser.run("return document.querySelector('#curves .plot').data.map((one) => one.name).filter(Boolean)")
    assert names == ["one", "one", "two", "two"]
    browser.run(
        "const one = document.querySelector('#config select.which'); one.value = '1'; one.dispatchEvent(new Event('change'))"
    )
    assert "0.5" in browser.run("return document.getElementById('config').innerText")
    quiet(browser)


def test_hostile_strings_do_nothing(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>")
    spoil(folder)
    browser.open(page_of(tmp_path / "page.html", folder.path))
    assert browser.run("return document.title").startswith("<img") and browser.run("return document.scripts.length") == 3
    assert browser.run("return document.querySelectorAll('main img, main script, main iframe').length") == 0
    assert "<script>document.title='taken'</script>" in browser.run("return document.getElementById('life').innerText")
    # Were a script to come into the page, the policy would not let it run.
    browser.run("const one = document.createElement('script'); one.textContent = 'window.taken = 1'; document.body.append(one)")
    assert browser.run("return window.taken === undefined")
    assert [line for line in browser.errors() if "Content Security Policy" not in line] == [] and browser.hosts <= {""}


def test_a_living_run_is_followed_without_a_reload(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 20)
    readers = RunReaders([folder])
    with PageServer(LiveDocument(readers.read), readers.title, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(server.url)
        browser.run("window.same = true")
        last = "return document.querySelector('#curves .plot').data[0].customdata.at(-1)"
        assert browser.run(last) == 20
        add_rows(folder, 21, 33)
        browser.wait(f"return (() => {{ {last} }})() === 33")
        assert browser.run("return window.same") and "33" in browser.run("return document.getElementById('run').innerText")
        quiet(browser, server.url.split("/")[2])
        for host, path, code in (("evil.example", "/", 403), (server.url.split("/")[2], "/config.yaml", 404)):
            with pytest.raises(urllib.error.HTTPError, match=str(code)):
                urllib.request.urlopen(urllib.request.Request(server.url.rstrip("/") + path, headers={"Host": host}))
        server.shutdown()


def test_plans_searches_and_rehearsals_are_drawn(browser: Browser, tmp_path: Path) -> None:
    words = ["qwen3_30b_a3b", "model.vocab_size=151936"]
    assert cli.run(["plan", *words, "--html", str(tmp_path / "plan.html")]) == 0
    browser.open(tmp_path / "plan.html")
    assert browser.run("return document.querySelectorAll('.plot .barlayer .point').length") > 5
    assert "tokens/s a GPU" in browser.run("return document.body.innerText")
    quiet(browser)
    small = ["quickstart", "model.vocab_size=512", "launch.processes_per_node=2"]
    assert cli.run(["plan", *small, "--search", "--html", str(tmp_path / "search.html")]) == 0
    browser.open(tmp_path / "search.html")
    assert browser.run("return document.querySelectorAll('.scatterlayer .point').length") >= 1
    quiet(browser)
    line = {"layout": HOSTILE, "engine": "megatron", "zero": 1, "micro_batch_seqs": 1, "ok": True, "bit_equal": False}
    same = line | dict.fromkeys(("loss_max_rel", "grad_norm_max_rel", "grad_max_rel", "weight_max_rel"), 1e-7)
    lines = [same, line | {"ok": False, "error": HOSTILE}]
    write_rehearsal_page(str(tmp_path / "rehearsal.html"), "quickstart", lines, ["a note"])
    browser.open(tmp_path / "rehearsal.html")
    assert browser.run("return document.querySelectorAll('.scatterlayer .point').length") == 4
    text = browser.run("return document.body.innerText")
    assert "1.0e-7" in text and "failed" in text and HOSTILE in text
    quiet(browser)


def test_a_coordinate_check_is_drawn(browser: Browser, tmp_path: Path) -> None:
    found = {"logits": {"1": [1.0, 2.0], "2": [1.0, 3.0], "4": [1.0, 4.0]}}
    found[HOSTILE] = {"1": [1.0, 1.0], "2": [0.7, 0.7], "4": [0.5, 0.6]}
    document = {"flat": False, "growing": ["logits"], "exponents": {"logits": 0.5, HOSTILE: -0.5}, "coordinates": found}
    write_coordinates_page(str(tmp_path / "page.html"), "quickstart", HOSTILE, "NOT FLAT: logits", document)
    browser.open(tmp_path / "page.html")
    # A chart for each kind, a line for each step, a point for each width.
    assert browser.run("return document.querySelectorAll('.plot').length") == 2
    assert browser.run("return document.querySelectorAll('.scatterlayer .point').length") == 2 * 2 * 3
    text = browser.run("return document.body.innerText")
    assert "NOT FLAT: logits" in text and "-0.50" in text and "step 1" in text and HOSTILE in text
    quiet(browser)


def test_a_ladder_is_drawn_with_its_law_and_scores(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RESAMPLES", 8)
    ladder = make_ladder(tmp_path)
    append_evaluation(RunFolder(ladder.run_dir(ladder.points[0])), {"step": 10, "scores": {HOSTILE: 0.5}})
    browser.open(page_of(tmp_path / "page.html", ladder.folder))
    assert browser.run("return document.querySelectorAll('#ladder tbody tr').length") == 12 + 6
    law = "document.querySelectorAll('#ladder .plot')[0]"
    assert browser.run(f"return {law}.querySelectorAll('.point').length") == 12
    assert browser.run(f"return {law}.querySelectorAll('.js-line').length") >= 1
    assert browser.run("return document.querySelectorAll('#tasks .point').length") == 1
    assert HOSTILE in browser.run("return document.getElementById('tasks').innerText")
    assert browser.run("return [...document.querySelectorAll('nav a')].map((one) => one.textContent)")[:3] == [
        "Ladder",
        "Curves",
        "Tasks",
    ]
    quiet(browser)


def test_a_ladder_is_followed_from_before_its_first_run(browser: Browser, tmp_path: Path) -> None:
    ladder = make_ladder(tmp_path, points=0)
    readers = LadderReaders(ladder)
    with PageServer(LiveDocument(readers.read), readers.title, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(server.url)
        assert browser.run(SECTIONS) == ["Ladder"]
        make_ladder(tmp_path, points=1)
        browser.wait("return document.querySelectorAll('#curves .plot .js-line, #curves .plot .point').length")
        assert "finished" in browser.run("return document.getElementById('ladder').innerText")
        quiet(browser, server.url.split("/")[2])
        server.shutdown()
