"""The page in a real browser: it asks for nothing, complains of nothing, sorts, draws, and shows what was recorded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.browser import Browser, Tab
from tests.caches import make_cache
from tests.runs import BEGAN, inputs_of, session, write_events, write_run

from kdpipe.manifests.run import read_run
from kdpipe.pipeline.report.gather import gather
from kdpipe.pipeline.report.page import page

HOSTILE = '</script><img src=x onerror="window.hit = 1"><!--'
LRS = {"b": 0.01, "a": 0.001, "c": 0.1}
LIVE = {"staleness/mean": 0.5, "wait/teacher/seconds": 0.25, "response_length/mean": 40.0}


@dataclass(frozen=True, kw_only=True)
class Opened:
    folder: Path
    page: Path
    tab: Tab


@pytest.fixture(scope="module")
def opened(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("page")
    make_cache(folder / "cache", num_samples=5)
    for number, (name, lr) in enumerate(LRS.items()):
        spec = {"train": {"lr": lr}, "loss": {"divergence": "jsd" if number else "forward_kl"}}
        further = LIVE if name == "b" else {}
        cache = folder / "cache"
        write_run(folder / "runs" / name, spec=spec, heldout_kl=0.1 * number + 0.05, further=further, cache=cache)
    failed = session(1, 4, began=BEGAN, inputs=inputs_of({"train": {"lr": 1e9}}))
    note = {"time": BEGAN, "kind": "note", "text": f"noted {HOSTILE}"}
    end = {"time": BEGAN + 60, "kind": "failed", "error": f"E-CHECK step 4: {HOSTILE}", "exit_code": 1}
    write_events(folder / "runs" / f"d {HOSTILE.replace('/', '')}", [*failed, note, end])
    out = folder / "report.html"
    out.write_text(page(gather([folder / "runs"]), out=out))
    tab = browser.open(out)
    assert tab.ask("window.drawn") is True
    return Opened(folder=folder, page=out, tab=tab)


def column(tab: Tab, key: str) -> list[str]:
    """The values of a column of the table of runs, from top to bottom."""
    return tab.ask(
        f"""(() => {{ const head = document.querySelector('#runs th[data-key="{key}"]');
        const rows = [...head.closest("table").tBodies[0].rows];
        return rows.map((row) => row.cells[head.cellIndex].dataset.value); }})()"""
    )


def click(tab: Tab, selector: str) -> None:
    tab.ask(f"document.querySelector({json.dumps(selector)}).click()")


def test_it_asks_for_nothing_and_complains_of_nothing(opened: Opened) -> None:
    assert opened.tab.requests() == []
    assert opened.tab.complaints() == []


def test_what_asks_for_something_is_noticed_and_refused(opened: Opened) -> None:
    assert "Failed to fetch" in opened.tab.ask("fetch('./page.css').catch((err) => err.message)")
    assert any("Content Security Policy" in each for each in opened.tab.complaints())
    opened.tab.forget()


def test_texts_of_runs_are_texts(opened: Opened) -> None:
    assert opened.tab.ask("[window.hit ?? 0, document.images.length]") == [0, 0]
    shown = opened.tab.ask("document.body.innerText")
    assert f"E-CHECK step 4: {HOSTILE}" in shown
    assert f"noted {HOSTILE}" in shown


def test_a_click_on_a_title_sorts_by_numbers_and_leaves_what_is_missing_last(opened: Opened) -> None:
    tab, head = opened.tab, '#runs th[data-key="{}"] button'
    click(tab, head.format("train.lr"))
    assert [float(value) for value in column(tab, "train.lr")] == [0.001, 0.01, 0.1, 1e9]
    click(tab, head.format("train.lr"))
    assert [float(value) for value in column(tab, "train.lr")] == [1e9, 0.1, 0.01, 0.001]
    click(tab, head.format("error"))
    assert column(tab, "error")[0].startswith("E-CHECK")
    assert column(tab, "error")[1:] == ["", "", ""]
    click(tab, head.format("error"))
    assert column(tab, "error")[0].startswith("E-CHECK")
    click(tab, head.format("run"))
    assert column(tab, "run")[:3] == ["a", "b", "c"]
    assert tab.ask("document.querySelectorAll('#runs th[aria-sort]').length") == 1


def test_the_table_has_the_numbers_of_the_records(opened: Opened) -> None:
    keys = ("heldout_kl", "heldout_reverse_kl", "top1_agreement", "heldout_ce", "perplexity")
    shown = dict(
        zip(column(opened.tab, "run"), zip(*(column(opened.tab, key) for key in keys), strict=True), strict=True)
    )
    for name in LRS:
        record = read_run(opened.folder / "runs" / name)
        assert record is not None
        assert record.metrics is not None
        assert [float(value) for value in shown[name]] == [record.metrics[key] for key in keys]


def test_the_curves_have_the_numbers_of_the_events(opened: Opened) -> None:
    for name in LRS:
        events = [json.loads(line) for line in (opened.folder / "runs" / name / "events.jsonl").open()]
        for data, kind, key in (("steps", "step", "loss/mean"), ("evals", "eval", "heldout_kl")):
            drawn = opened.tab.ask(
                f"data.{data}.filter((row) => row.run === '{name}').map((r) => [r.step, r['{key}']])"
            )
            assert drawn == [[event["step"], event[key]] for event in events if event["kind"] == kind]


def test_each_figure_is_drawn_with_a_line_for_each_run(opened: Opened) -> None:
    lines = "document.querySelectorAll('#{} .mark-line path').length"
    assert opened.tab.ask(lines.format("curves-0")) == 4
    assert opened.tab.ask(lines.format("live-1")) == 1
    empty = "[...document.querySelectorAll('.plot')].filter((plot) => plot.querySelector('svg') === null).length"
    assert opened.tab.ask(empty) == 0
    points = "document.querySelectorAll('#{} .mark-symbol.role-mark path').length"
    assert [opened.tab.ask(points.format(name)) for name in ("sweep-0", "sweep-1")] == [3 + 1, 3 + 1]


def waited(tab: Tab, script: str, value: object) -> Any:
    """The value of an expression as soon as it is the one; the page draws after a change, not in it."""
    return tab.ask(
        f"""new Promise((done) => {{ let left = 100; const look = () => {{ const value = {script};
        if (value === {json.dumps(value)} || left-- === 0) done(value); else setTimeout(look, 50); }}; look(); }})"""
    )


def test_curves_are_drawn_against_tokens_when_asked(opened: Opened) -> None:
    click(opened.tab, '#curves input[value="tokens"]')
    title = "document.querySelector('#curves-0 .role-axis-title text')?.textContent"
    assert waited(opened.tab, title, "tokens trained on") == "tokens trained on"


def test_a_run_that_is_clicked_away_is_drawn_no_more(opened: Opened) -> None:
    click(opened.tab, '#curves .chip[data-run="a"]')
    count = "document.querySelectorAll('#curves-0 .mark-line path').length"
    assert waited(opened.tab, count, 3) == 3
    click(opened.tab, '#curves .chip[data-run="a"]')
    assert waited(opened.tab, count, 4) == 4


def test_it_fits_a_narrow_window(opened: Opened, browser: Browser) -> None:
    tab = browser.open(opened.page, width=400)
    assert tab.ask("window.drawn") is True
    assert tab.ask("document.documentElement.scrollWidth") <= 400


def test_its_links_lead_to_the_events_beside_it(opened: Opened) -> None:
    links = opened.tab.ask("[...document.querySelectorAll('#repeat a')].map((link) => link.href)")
    assert sorted(links) == sorted((path / "events.jsonl").as_uri() for path in (opened.folder / "runs").iterdir())
