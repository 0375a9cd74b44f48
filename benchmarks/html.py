"""The HTML report: one file, no network, filters, readable in light and dark."""

from __future__ import annotations

import base64
import json
import tempfile
from html import escape
from pathlib import Path

from . import report
from .rows import Run

TEMPLATE = Path(__file__).with_name("report.template.html")


def write(run: Run, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(run), encoding="utf-8")
    return path


def render(run: Run) -> str:
    """The page as a string; the data sit in it as JSON, the plots as base64 PNG in both themes."""
    machine = run.machine
    data = json.dumps(report.finite(run.as_dict()), ensure_ascii=False).replace("</", "<\\/")
    fields = {
        "title": f"fasttx bench: {machine.get('cpu', 'unknown machine')}",
        "facts": _facts(run),
        "legend": "".join(f"<li>{escape(line)}</li>" for line in report.legend(run)),
        "gains": _gains(run),
        "losses": _list(report.losses(run.rows), "fasttx wins every row that was measured."),
        "left_out": _list([f"{s['what']}: {s['why']}" for s in run.skipped], "Nothing."),
        "notes": _list(run.notes, "None."),
        "musts": _musts(run),
        "plots": _plots(run),
        "data": data,
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, value in fields.items():
        page = page.replace("{{" + name + "}}", value)
    return page


def _facts(run: Run) -> str:
    machine = run.machine
    packages = machine.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    load = machine.get("load_average") or []
    facts = {
        "Command": run.command,
        "Date": run.started,
        "Processor": f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('isa')}",
        "GPU": machine.get("gpu"),
        "Versions": f"Python {machine.get('python')}, {versions}",
        "Commit": machine.get("commit"),
        "Load average at start": ", ".join(f"{value:.2f}" for value in load),
        "Took": f"{run.seconds:.0f} s",
    }
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
        if value
    )


def _list(lines: list[str], empty: str) -> str:
    if not lines:
        return f"<p>{escape(empty)}</p>"
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _gains(run: Run) -> str:
    lines = report.gains(run)
    return "<h2>Models, unpatched and patched</h2>" + _list(lines, "") if lines else ""


def _musts(run: Run) -> str:
    if not run.musts:
        return ""
    lines = []
    for must in run.musts:
        cells = (must["what"], must["measured"], must["must"], must["aim"] or "")
        verdict = must["verdict"]
        lines.append(
            "<tr>"
            + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
            + f'<td class="{escape(verdict.lower())}">{escape(verdict)}</td></tr>'
        )
    lines = "".join(lines)
    head = "<tr><th>goal</th><th>measured</th><th>must</th><th>aim</th><th></th></tr>"
    table = f"<table class=goals><thead>{head}</thead><tbody>{lines}</tbody></table>"
    return "<h2>Goals</h2>" + table


def _plots(run: Run) -> str:
    try:
        from . import plots

        with tempfile.TemporaryDirectory() as folder:
            pairs = zip(
                plots.write_all(run, Path(folder), "light"),
                plots.write_all(run, Path(folder), "dark"),
                strict=True,
            )
            return "".join(_picture(light, dark) for light, dark in pairs)
    except ImportError as missing:
        return f"<p>No plots: {escape(str(missing))}</p>"


def _picture(light: Path, dark: Path) -> str:
    sources = [base64.b64encode(path.read_bytes()).decode() for path in (dark, light)]
    return (
        '<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{sources[0]}">'
        f'<img alt="{escape(light.stem)}" src="data:image/png;base64,{sources[1]}"></picture>'
    )
