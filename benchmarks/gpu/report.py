"""gpu.md: what ran, what failed and how to see it again, and the tables of what was measured."""

from __future__ import annotations

from .record import Item, Outcome, Record
from .speed import is_ours


def markdown(record: Record, left: list[Item]) -> str:
    facts, items = record.machine, record.outcomes
    versions = ", ".join(f"{n} {v}" for n, v in facts["packages"].items() if v)
    lines = [
        f"# {facts.get('gpu', facts['cpu'])}",
        "",
        f"commit {facts['commit']}; Python {facts['python']}, {versions}, CUDA {facts.get('cuda')}",
        "",
        *_parts(items, left),
        *_tests(items),
        *_failures(items),
        *_limits(items),
        *_attention(items),
        *_ops(items),
        *_tuned(items),
    ]
    return "\n".join(lines) + "\n"


def _parts(items: dict[str, Outcome], left: list[Item]) -> list[str]:
    parts = dict.fromkeys([*(o.part for o in items.values()), *(i.part for i in left)])
    rows = ["| part | ok | failed | refused | not done | seconds |", "|---|---|---|---|---|---|"]
    for part in parts:
        mine = [o for o in items.values() if o.part == part]
        counts = [sum(o.status == s for o in mine) for s in ("ok", "failed", "refused")]
        waiting = sum(i.part == part for i in left)
        numbers = [*counts, waiting, round(sum(o.seconds for o in mine))]
        rows.append(f"| {part} | " + " | ".join(map(str, numbers)) + " |")
    return [*rows, ""]


def _tests(items: dict[str, Outcome]) -> list[str]:
    rows = []
    for key, o in items.items():
        if o.part == "test" and "passed" in o.result:
            r = o.result
            rows.append(f"| {key} | {r['passed']} | {r['failed']} | {r['skipped']} |")
        elif o.part == "sanitize":
            text = o.result.get("summary") or (o.message.strip().splitlines() or [""])[-1]
            rows.append(f"| {key} | {o.status}: {text} | | |")
    head = ["| tests | passed | failed | skipped |", "|---|---|---|---|"]
    return [*head, *rows, ""] if rows else []


def _failures(items: dict[str, Outcome]) -> list[str]:
    rows = []
    for key, o in items.items():
        if o.status == "refused":
            rows.append(f"- {key} refused: {o.message}")
        if o.status != "failed":
            continue
        details = o.failures or [{"what": key, "message": o.message, "reproduce": o.reproduce}]
        for d in details:
            text = " ".join(d["message"].split())[-300:]
            rows.append(f"- {d['what']}: {text}\n  `{d['reproduce'] or o.reproduce}`")
    return ["## Failed", "", *rows, ""] if rows else []


def _limits(items: dict[str, Outcome]) -> list[str]:
    found = items.get("bench/limits")
    if found is None or found.status != "ok":
        return []
    r = found.result
    gemm = ", ".join(f"{n} {x / 1e12:.0f} TFLOP/s" for n, x in r["gemm"].items())
    return [f"The card's own limits: matrix product {gemm}; copy {r['copy'] / 1e12:.2f} TB/s.", ""]


def _attention(items: dict[str, Outcome]) -> list[str]:
    cases = [o.result for o in items.values() if o.result.get("case")]
    if not cases:
        return []
    names = list(dict.fromkeys(n for c in cases for n in c["rows"]))
    head = "| D | S | kind | direction | " + " | ".join(names) + " | best fasttx / best other |"
    rows = [head, "|" + "---|" * (len(names) + 5)]
    for c in cases:
        case = c["case"]
        kind = case["bias"] or ("causal" if case["causal"] else "full")
        for direction in ("forward", "backward"):
            rates = {n: r[direction]["tflops"] for n, r in c["rows"].items()}
            ours = max((x for n, x in rates.items() if is_ours(n)), default=None)
            best = max((x for n, x in rates.items() if not is_ours(n)), default=None)
            ratio = f"{ours / best:.2f}x" if ours and best else ""
            cells = [f"{rates[n]:.0f}" if n in rates else "" for n in names]
            cells = [str(case["D"]), str(case["S"]), kind, direction, *cells, ratio]
            rows.append("| " + " | ".join(cells) + " |")
    return ["## Attention, TFLOP/s", "", *rows, ""]


def _ops(items: dict[str, Outcome]) -> list[str]:
    rows = []
    for o in items.values():
        for r in o.result.get("rows", ()) if isinstance(o.result.get("rows"), list) else ():
            if r["provider"] != "fasttx" or r["median_s"] is None:
                continue
            ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}x of {r['ratio_to']}"
            share = "" if r["share"] is None else f"{100 * r['share']:.0f} % of {r['share_of']}"
            rows.append(
                f"| {r['op']} | {r['case']} | {r['dtype']} | {r['direction']} | "
                f"{r['median_s'] * 1e6:.1f} | {ratio} | {share} | {r['ok']} |"
            )
    head = [
        "| op | case | dtype | direction | us | ratio | share | right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return ["## Ops", "", *head, *rows, ""] if rows else []


def _tuned(items: dict[str, Outcome]) -> list[str]:
    rows = [
        f"| {o.result['key']} | {o.result['used']} | {o.result['used_us']:.1f} | "
        f"{o.result['best']} | {o.result['best_us']:.1f} | {o.result['gain']:.2f}x |"
        for o in items.values()
        if o.part == "tune" and o.status == "ok"
    ]
    head = ["| entry | tile | us | best tile | us | gain |", "|---|---|---|---|---|---|"]
    return ["## Tiles", "", *head, *rows, ""] if rows else []
