"""One tiny run through the command: files written, well-formed, and saying the same."""

import csv
import json
from html.parser import HTMLParser

import pytest
from fasttx.benchmarks import report
from fasttx.benchmarks import run as command
from fasttx.benchmarks.rows import SCHEMA, Row, Run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    arguments = "attention --seqlen 16,32 --heads 2 --head-dim 8 --dtype fp32 --budget 0.01"
    code = command.main([*arguments.split(), "--out", str(out), "--provider", "fasttx,sdpa,eager"])
    assert code == 0
    return out


@pytest.fixture(scope="module")
def data(folder):
    return json.loads((folder / "results.json").read_text())


def test_json_holds_every_row_and_how_it_was_made(data):
    assert data["schema"] == SCHEMA
    assert len(data["rows"]) == 2 * 2 * 2 * 3
    assert data["machine"]["packages"]["torch"]
    assert data["limits"][0]["gemm"]["fp32"] > 0
    for row in data["rows"]:
        assert row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["ok"] is True, row["why"]
        assert row["ratio"] is not None
        assert row["error"] < 1e-5


def test_csv_says_what_json_says(folder, data):
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data["rows"])
    for flat, full in zip(rows, data["rows"], strict=True):
        assert float(flat["median_s"]) == full["median_s"]
        assert int(flat["shape_queries"]) == full["shape"]["queries"]
        assert (flat["provider"], flat["ok"]) == (full["provider"], "True")


def test_plots_are_png(folder):
    plots = sorted(folder.glob("*.png"))
    assert [plot.name for plot in plots] == ["rates.png", "ratios-op.png"]
    assert all(plot.read_bytes().startswith(PNG) for plot in plots)


class _Page(HTMLParser):
    VOID = frozenset({"meta", "img", "source", "input", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.scripts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts.append(text)


def test_html_is_one_file_that_needs_no_network(folder, data):
    text = (folder / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert "{{" not in text
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert json.loads(page.scripts[0])["rows"] == data["rows"]
    assert "prefers-color-scheme: dark" in text
    for address in ("http://", "https://", "@import"):
        assert address not in text


def test_html_survives_hostile_text(tmp_path):
    run = Run("fasttx bench </script><b>", "now", {"cpu": "<i>&", "packages": {}})
    run.rows.append(_row(case="</script><img src=x>", ratio=None))
    from fasttx.benchmarks import html

    text = html.write(run, tmp_path / "page.html").read_text()
    page = _Page()
    page.feed(text)
    assert json.loads(page.scripts[0])["rows"][0]["case"] == "</script><img src=x>"
    assert page.links == [] or all(link.startswith("data:") for link in page.links)


def _row(**changes):
    facts = {
        "kind": "op", "op": "attention", "case": "c", "direction": "forward", "provider": "fasttx",
        "label": "fasttx", "dtype": "fp32", "device": "cpu", "threads": 1, "clock": "thread_cpu",
        "shape": {"queries": 8}, "median_s": 1.0, "low_s": 0.9, "high_s": 1.1, "samples": 9,
        "coverage": 0.96, "ok": True, "ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6,
        "ratio_best": 0.5, "ratio_best_high": 0.6,
        "best_other": "sdpa", "ratio_to": "sdpa", "rate": 1e9, "share": 0.5,
    }  # fmt: skip
    return Row(**{**facts, **changes})


def test_losses_and_wrong_answers_are_told_in_words():
    run = Run("c", "now", {})
    run.rows = [_row(), _row(ratio_best=1.5), _row(ok=False, why="out: off", ratio_best=None)]
    run.rows.append(_row(ratio_best=0.99, ratio_best_high=1.01))
    lines = report.losses(run.rows)
    assert [line.split()[0] for line in lines] == ["slower", "WRONG", "equal"]
    assert "0.50x of sdpa" in lines[0]


def test_table_shows_interval_mark_and_ratio():
    text = report.table([_row(), _row(provider="sdpa", label="PyTorch SDPA", ratio=1.0)]).plain
    assert "0.50x" in text
    assert "-10.0/+10.0 %" in text
    assert "✓" in text
    few = report.table([_row(samples=4, coverage=0.875)]).plain
    assert "n4" in few


def test_infinities_become_null():
    assert report.finite({"a": [float("inf"), float("nan"), 1.0]}) == {"a": [None, None, 1.0]}
