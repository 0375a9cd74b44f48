"""The HTML report in a real browser: it opens without errors and without a network, its filters
leave the rows they name, a click on a column sorts."""

import itertools
from dataclasses import replace

import pytest
from fasttx.benchmarks import html, report
from fasttx.benchmarks.rows import Row, Run

from tests.inspect.test_browser import BROWSER, run

KINDS = {
    "op": ("attention", "encoder B8 H12 S128 D64", "forward", ("fasttx", "sdpa", "eager")),
    "model": ("bert-base", "bert-base, 4 layers, 8 x 128", "step", ("fasttx", "sdpa")),
    "layer": ("gpt2", "gpt2 layer, 2 x 512", "forward", ("fasttx", "fasttx_nn", "torch_nn")),
    "train": ("toy-t5", "training toy-t5, 128 x 14", "train", ("fasttx", "sdpa")),
    "generate": ("gpt2", "gpt2, 1 x 8 + 64", "generate", ("fasttx", "dynamic", "ctranslate2")),
}


def example() -> Run:
    """A run with rows of every kind; in bf16 attention, fasttx loses, in generation it is wrong."""
    found = Run("fasttx bench", "2026-01-01", {"cpu": "a processor", "packages": {}}, seconds=3)
    for (kind, (op, case, direction, names)), dtype in itertools.product(
        KINDS.items(), ("fp32", "bf16")
    ):
        for i, name in enumerate(names):
            ours, lost = name.startswith("fasttx"), kind == "op" and dtype == "bf16"
            wrong = kind == "generate" and ours and dtype == "bf16"
            ratio = (0.8 if lost else 1.9) if ours else 1.0 - 0.3 * (i > 1)
            median = 0.05 / ratio
            row = Row(
                kind, op, case, direction, name, name, dtype, "cpu", 1, "thread_cpu",
                {"batch": 8, "queries": 128}, median_s=median, low_s=0.98 * median,
                high_s=1.02 * median, samples=9, coverage=0.96, converged=True,
                first_call_s=0.2, warmup_s=0.4, cold_s=3.0, tokens=1024,
                tokens_per_s=1024 / median, peak_bytes=(60 if ours else 100) << 20,
                rate=1e11 * ratio, flops=5_000_000_000, share=0.3 * ratio, share_of="product",
                error=1e-6, ok=not wrong, why="out: far off" if wrong else "",
            )  # fmt: skip
            if not wrong:
                row.ratio_to = next(n for n in names if not n.startswith("fasttx"))
                row.ratio, row.ratio_low, row.ratio_high = ratio, 0.97 * ratio, 1.03 * ratio
                if ours:
                    row.best_other, row.ratio_best = row.ratio_to, ratio
                    row.ratio_best_low, row.ratio_best_high = 0.97 * ratio, 1.03 * ratio
            found.rows.append(row)
    return found


def test_what_patching_gains_is_a_line_a_dtype():
    lines = report.gains(example())
    assert len(lines) == 2
    assert lines[0] == (
        "bert-base fp32, 1 thr.: training step 8 x 128 50 ms -> 26.3 ms, 1.90x; "
        "its peak memory 100.0 MiB -> 60.0 MiB, 60 %"
    )


def test_what_leaving_padding_out_gains_stands_beside_it():
    run = example()
    [patched, *_] = [row for row in run.rows if row.kind == "model" and row.provider == "fasttx"]
    run.rows.append(replace(patched, provider="fasttx_unpad", ratio=2.5))
    assert "26.3 ms, 1.90x (2.50x with unpad=True); its peak" in report.gains(run)[0]


def test_what_patching_does_not_gain_is_told_too():
    run = example()
    run.rows = [row for row in run.rows if row.kind == "model" and row.provider == "sdpa"]
    for row in run.rows:
        row.ratio_to = "sdpa"
    assert report.gains(run)[0] == (
        "bert-base fp32, 1 thr.: nothing: fasttx.patch finds nothing in it that it knows"
    )


def test_another_commit_is_no_gain_of_patching():
    run = example()
    for row in run.rows:
        row.ratio_to = "base"
    assert report.gains(run) == []


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
def test_filters_and_columns(tmp_path):
    seen = run(html.render(example()), """
const choose = (name, value) => { const s = document.querySelector(`select[name="${name}"]`);
  s.value = value; s.dispatchEvent(new Event("change")); };
const shown = () => document.getElementById("count").textContent;
const lines = () => [...document.querySelectorAll("#rows tbody tr:not(.group)")];
seen.all = shown(); seen.names = [...document.querySelectorAll("select")].map(s => s.name);
choose("kind", "train"); seen.train = shown(); choose("kind", "");
choose("dtype", "bf16"); choose("fasttx", "slower than the best"); seen.lost = shown();
seen.lostCase = document.querySelector("#rows tr.group th").textContent;
choose("fasttx", ""); choose("dtype", "");
choose("answer", "wrong"); seen.wrong = shown(); seen.hint = lines()[0].title;
choose("answer", "");
const box = document.querySelector("input[type=search]");
box.value = "gpt2 layer"; box.dispatchEvent(new Event("input")); seen.layer = shown();
box.value = ""; box.dispatchEvent(new Event("input"));
const heads = [...document.querySelectorAll("#rows thead th")];
seen.columns = heads.map(h => h.textContent);
heads[1].click(); seen.sorted = lines().map(l => parseFloat(l.cells[1].textContent));
seen.pictures = [...document.images].every(i => i.complete && i.naturalWidth > 100);
seen.width = document.documentElement.scrollWidth <= innerWidth;
""", tmp_path)  # fmt: skip
    assert seen["errors"] == []
    assert all(name.startswith("data:") for name in seen["loaded"])
    total = 2 * sum(len(names) for *_, names in KINDS.values())
    assert seen["all"] == f"{total} of {total} rows"
    assert {"kind", "name", "pass", "dtype", "provider", "answer", "fasttx"} <= set(seen["names"])
    assert seen["train"].startswith("4 of")
    assert seen["lost"].startswith("1 of") and "encoder" in seen["lostCase"]
    assert seen["wrong"].startswith("1 of") and "far off" in seen["hint"]
    assert seen["layer"].startswith("6 of")
    assert {"warm-up", "cold start", "tokens/s", "peak memory"} <= set(seen["columns"])
    assert "compile" not in seen["columns"]
    assert seen["sorted"] == sorted(seen["sorted"])
    assert seen["pictures"] and seen["width"]
