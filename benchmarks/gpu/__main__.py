"""The command ``python -m benchmarks.gpu``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import machine
from . import commands, report, speed, tune
from .isolate import Worker
from .record import Item, Outcome, Record, RecordError

PARTS = {
    "build": commands.builds,
    "test": commands.suites,
    "sanitize": commands.sanitizers,
    "tune": tune.items,
    "bench": speed.items,
}
BadUsage = typer.BadParameter.__base__
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def gpu(
    only: Annotated[str, typer.Option(help="Parts, comma-separated.")] = ",".join(PARTS),
    match: Annotated[str, typer.Option(help="Only items whose key contains this.")] = "",
    seconds: Annotated[float, typer.Option(help="Start nothing new after this long.")] = 540.0,
    out: Annotated[Path | None, typer.Option(help="Folder; benchmarks/results/<card>.")] = None,
    commit: Annotated[str, typer.Option(help="What to record where there is no git.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Do items over that are done.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Only write the tiles that were tuned into kernels/.")
    ] = False,
) -> int:
    """Build, test, sanitize, tune and benchmark on this machine's CUDA device."""
    parts = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise BadUsage(f"--only must be of {', '.join(PARTS)}, got {only!r}")
    if not 0 < seconds < float("inf"):
        raise BadUsage(f"--seconds must be above 0, got {seconds:g}")
    if not adopt and not torch.cuda.is_available():
        raise BadUsage("no CUDA device: nothing of this can be had without one")
    if adopt and out is None:
        raise BadUsage("--adopt needs --out, the folder of the record")
    facts = machine.describe()
    facts["commit"] = facts["commit"] or commit or None
    folder = out or Path(__file__).resolve().parents[1] / "results" / facts["class"]
    path = folder / "gpu.json"
    if adopt:
        print(tune.adopt(path))
        return 0
    if again and path.exists() and set(parts) == set(PARTS) and not match:
        path.unlink()
    try:
        record = Record(path, facts)
    except RecordError as error:
        raise BadUsage(str(error)) from None
    items = [i for part in parts for i in PARTS[part]() if match in i.key]
    left = execute(items, record, seconds, again)
    commands.remember(record, commands.ROOT / "fasttx" / "gpu_runs.json")
    (folder / "gpu.md").write_text(report.markdown(record, left))
    print(report.markdown(record, left))
    print(f"wrote {path} and {folder / 'gpu.md'}")
    return (
        1 if any(record.outcomes[i.key].status == "failed" for i in items if i not in left) else 0
    )


def execute(items: list[Item], record: Record, seconds: float, again: bool = False) -> list[Item]:
    """Runs what is not done yet; the items there was no time for come back."""
    worker, deadline, left = Worker(), time.monotonic() + seconds, []
    try:
        for item in items:
            done = record.outcomes.get(item.key)
            if done is not None and not again:
                continue
            if time.monotonic() > deadline:
                left.append(item)
                continue
            outcome = worker.run(item)
            record.add(item.key, outcome)
            _tell(item, outcome)
    finally:
        worker.stop()
    return left


def _tell(item: Item, outcome: Outcome) -> None:
    text = outcome.message.strip().splitlines()
    print(
        f"{outcome.status:8}{outcome.seconds:7.1f} s  {item.key}  {text[-1] if text else ''}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    try:
        code = app(arguments, prog_name="python -m benchmarks.gpu", standalone_mode=False)
    except BadUsage as error:
        print(f"benchmarks.gpu: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
