"""The command `fasttx inspect`."""

import sys
from typing import Annotated

import typer

__all__ = ["inspect"]


def inspect(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder with its tokenizer.")],
    text: Annotated[str, typer.Argument(help="What the model reads.")],
    output: Annotated[str, typer.Option(help="The folder for index.html and PNGs.")] = "inspect",
    target: Annotated[
        str | None,
        typer.Option(help="What a seq2seq model's decoder reads; what it writes unless given."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Shown first; the last unless given.")] = None,
    head: Annotated[int | None, typer.Option(help="Shown first; 0 unless given.")] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Above 512 tokens: exact rows to keep, like 0,17,-1."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many next words.")] = 20,
    patched: Annotated[
        bool, typer.Option("--patched", help="transformers' model after fasttx.patch.")
    ] = False,
):
    """Show what a model does with a text: attention, rollout, embeddings, probabilities.

    fasttx inspect models/gpt2 "the book the teacher gave the student"
    """
    try:
        from .inspect.files import write
        from .inspect.folder import load
        from .inspect.inspection import look
    except ModuleNotFoundError as error:
        _refuse(f"{error.name} is not installed: pip install 'fasttx[train]'")
    try:
        chosen = None if rows is None else [int(row) for row in rows.split(",")]
    except ValueError:
        _refuse(f"--rows {rows}: give positions like 0,17,-1")
    try:
        if not text.strip():
            raise ValueError("text must not be empty")
        found = look(*load(model, patched=patched), text, target=target, rows=chosen, top_k=top_k,
                     layer=layer, head=head)  # fmt: skip
        paths = write(found, output, layer=layer, head=head)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        _refuse(error)
    for path in paths:
        print(path)


def _refuse(words) -> None:
    print(f"fasttx: {words}", file=sys.stderr)
    raise typer.Exit(2)
