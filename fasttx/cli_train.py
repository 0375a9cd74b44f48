"""The command `fasttx train`."""

import os
import sys
from typing import Annotated

import typer

__all__ = ["train"]

# As a shell has it: 128 and the signal's number.
SIGNALS = {"SIGINT": 130, "SIGTERM": 143}


def train(
    config: Annotated[str, typer.Argument(help="A YAML file; docs/training.md shows one.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="Another folder for the run than the file's.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
):
    """Train a model on your text: tokenizer, objective, model and options from one YAML file.

    Exit codes: 0 done; 1 training had to stop, the last checkpoint is whole; 2 wrong input, nothing
    was trained; 130 and 143 stopped by a signal, with a checkpoint.
    """
    try:
        from .training import TrainingError
        from .training.run import train as run
    except ModuleNotFoundError as error:
        _say(f"{error.name} is not installed: pip install 'fasttx[train]'")
        raise typer.Exit(2) from None
    try:
        result = run(config, resume=resume, output=output, progress=not quiet)
    except TrainingError as error:
        _say(error)
        raise typer.Exit(1) from None
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        _say(error)
        raise typer.Exit(2) from None
    folder = result.checkpoint.parent.parent
    if result.stopped in SIGNALS:
        _say(f"{result.stopped}: saved step {result.steps}; go on with --resume")
        raise typer.Exit(SIGNALS[result.stopped])
    if int(os.environ.get("RANK", 0)):  # one of torchrun's processes speaks
        return
    lowest = result.best_loss
    held = "" if lowest is None else f", evaluation loss {lowest:.4f} at step {result.best_step}"
    print(f"{folder / 'model'}: {result.steps} steps, loss {result.loss:.4f}{held}")


def _say(words) -> None:
    print(f"fasttx: {words}", file=sys.stderr)
