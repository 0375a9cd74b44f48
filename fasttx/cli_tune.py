"""The command `fasttx tune`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["tune"]


def tune(
    ops: Annotated[
        list[str] | None, typer.Argument(help="attention, linear, ...; every op if none.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, one a class: a few minutes.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16; fp32,bf16 if none.")] = None,
    threads: Annotated[
        str | None, typer.Option(help="Thread counts, e.g. 1,2; torch's own number if none.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda if there is one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, write nothing.")] = False,
    reset: Annotated[
        bool, typer.Option("--reset", help="Forget what was measured before, and stop.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Another file than the one in your cache.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Also every time that was measured, there.")
    ] = None,
):
    """Measure which kernel is the fastest on this machine, and keep it in your cache.

    fasttx's kernels and PyTorch's own operations take turns on each op and shape class. `fasttx
    info` shows what is kept, `fasttx explain` what a call gets from it; FASTTX_TUNE=0 leaves it
    alone.
    """
    from . import choice, choice_tables

    if reset:
        if ops or quick or dry_run or output or json:
            _refuse("--reset forgets everything: give it alone")
        try:
            choice_tables.user_file().unlink(missing_ok=True)
        except OSError as error:
            _refuse(error)
        choice.forget()
        print(f"{choice_tables.user_file()} is gone")
        return
    import torch
    from rich.console import Console

    from fasttx.benchmarks import options as asked
    from fasttx.benchmarks.tune import Options, execute

    try:
        counts = asked.thread_counts(threads) if threads else (torch.get_num_threads(),)
        execute(
            Options(
                tuple(dict.fromkeys(ops or ())), asked.dtypes(dtype), counts,
                asked.device(device), quick, dry_run, output, json,
            ),
            Console(),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        _refuse(error)


def _refuse(words) -> None:
    print(f"fasttx: {words}", file=sys.stderr)
    raise typer.Exit(2)
