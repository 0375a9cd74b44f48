"""The command ``fasttx bench``."""

from __future__ import annotations

import shlex
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import never_slower, report
from . import options as asked
from .options import Options
from .session import Session

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
BadUsage = typer.BadParameter.__base__


@app.command()
def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="op, layer, model, train or generate NAME, or just names; none: attention bert, "
            "op: every op. never-slower [OP ...]: the grid on which PyTorch must not be faster."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under 4 minutes. The default.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More shapes, features, time.")] = False,
    musts: Annotated[bool, typer.Option("--musts", help="The speed goals, PASS or MISS.")] = False,
    suite: Annotated[str | None, typer.Option(help="quick, full or musts.")] = None,
    seqlen: Annotated[str | None, typer.Option(help="Sequence lengths, e.g. 128,512.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size, with --seqlen.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads, with --seqlen.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Head size, with --seqlen.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16; fp32,bf16 if none.")] = None,
    direction: Annotated[str | None, typer.Option(help="forward, backward, step.")] = None,
    provider: Annotated[str | None, typer.Option(help="fasttx, sdpa, eager, ...; all.")] = None,
    backend: Annotated[str | None, typer.Option(help="Force fasttx's backend.")] = None,
    threads: Annotated[str | None, typer.Option(help="Thread counts, e.g. 1,2.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda if there is one.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds a group of rows may take.")] = None,
    stage: Annotated[str | None, typer.Option(help="Part of --musts: ratios, errors, ...")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory, fresh processes.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Cold start, fresh processes.")] = False,
    base: Annotated[str | None, typer.Option(help="Compare with another commit of fasttx.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the CSV there.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; reports/<time>.")] = None,
) -> int:
    """Time fasttx beside what else is installed: interleaved, checked against fp64, losses told.

    Leaves CSV, JSON, PNG plots and one HTML page, and prints where. docs/benchmarks.md explains
    every column.
    """
    try:
        chosen = asked.suite(suite, quick=quick, full=full, musts=musts)
        targets = targets or []
        walk = targets[:1] == ["never-slower"]
        named = asked.targets([] if walk else targets)
        sizes = asked.sizes("--seqlen", seqlen)
        if sizes and not targets:
            named["models"] = ()
        options = Options(
            **named,
            suite=chosen,
            sizes=sizes,
            batch=asked.one_size("--batch", batch),
            heads=asked.one_size("--heads", heads),
            head_dim=asked.one_size("--head-dim", head_dim, 256),
            dtypes=asked.dtypes(dtype),
            directions=asked.directions(direction),
            default_directions=direction is None,
            providers=asked.provider_names(provider),
            backend=next(iter(asked.choose("backend", backend, asked.BACKENDS)), None),
            threads=asked.thread_counts(threads),
            default_threads=threads is None,
            device=asked.device(device),
            budget_s=asked.seconds("--budget", budget),
            memory=memory or chosen == "full",
            cold=cold or chosen == "full",
            stages=asked.choose("stage", stage, asked.STAGES),
            csv=asked.place("--csv", csv),
            json=asked.place("--json", json),
            out=asked.place("--out", out, folder=True),
            command=shlex.join(["fasttx", "bench", *_arguments()]),
        )
        if base is not None and (walk or options.suite == "musts"):
            raise asked.UsageError("--base compares --quick or --full, no goals and no grid")
        asked.check_folders(options.models)
        if walk:
            return never_slower.execute(options, Console(), tuple(targets[1:]))
        if base is not None:
            from .base import BaseSession

            return execute(options, Console(), BaseSession(options, Console(), base))
        return execute(options, Console())
    except asked.UsageError as error:
        raise BadUsage(str(error)) from None


def execute(options: Options, console: Console, session: Session | None = None) -> int:
    if options.suite == "musts":
        from . import musts

        return musts.execute(options, console)
    warnings.filterwarnings("ignore", message=".*runs on the plain PyTorch reference.*")
    run = (session or Session(options, console)).execute()
    folder = options.out or Path("reports") / datetime.now().strftime("%Y%m%d-%H%M%S")
    written = report.write_all(run, folder)
    if options.csv is not None:
        written.append(report.write_csv(run, options.csv))
    if options.json is not None:
        written.append(report.write_json(run, options.json))
    report.print_report(run, console, options.memory)
    console.print()
    for path in written:
        console.print(f"wrote {path.resolve()}", soft_wrap=True, highlight=False)
    wrong = [row for row in run.rows if row.provider == "fasttx" and row.ok is False]
    return 1 if wrong else 0


def _arguments() -> list[str]:
    words = sys.argv[1:]
    return words[1:] if words[:1] == ["bench"] else words


def main(arguments: list[str] | None = None) -> int:
    """``python -m fasttx.benchmarks.run``: wrong input is one line on stderr and exit code 2."""
    try:
        code = app(arguments, prog_name="fasttx bench", standalone_mode=False)
    except BadUsage.__base__ as error:
        print(f"fasttx bench: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
