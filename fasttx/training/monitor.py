"""What is seen of a run: log.jsonl, loss.png, the progress bar with the share of the limit."""

import json
import time
from pathlib import Path

import torch
from torch import nn

from ..layers import LearnedPositions, RelativeBias
from .checkpoint import write_whole

__all__ = ["Display", "Log", "plot_losses", "training_flops"]


class Log:
    """log.jsonl: a JSON object a line, each with its step. Opened at a step, it forgets what a
    killed process wrote after it."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [entry for entry in read_log(path) if entry["step"] <= step]
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, **entry) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[dict]:
    """Its entries; a last line that was cut off is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def training_flops(model: nn.Module, source: int, target: int, labelled: int) -> int:
    """Of one step's weight matrices, forward and backward, 6 for each of their elements and token:
    the encoder's (or decoder-only model's) for `source` tokens, a seq2seq's decoder's for `target`
    tokens, the output layer's for `labelled` ones. Attention's own products are not counted."""
    tables = {
        p
        for m in model.modules()
        if isinstance(m, (nn.Embedding, LearnedPositions, RelativeBias))
        for p in m.parameters(recurse=False)
    }
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    outputs = [p for _, p in matrices if p.shape[0] == vocabulary]
    # A table is an output layer where it is tied, so where there is no other.
    outputs = [p for p in outputs if p not in tables] or outputs
    total = sum(p.numel() for p in outputs[:1]) * labelled
    for name, p in matrices:
        if p not in tables and p.shape[0] != vocabulary:
            total += p.numel() * (target if target and "decoder" in name else source)
    return 6 * total


class Display:
    """A line that moves on a terminal, or a line now and then elsewhere; nothing if not `shown`."""

    def __init__(self, shown: bool, step: int, steps: int, device: torch.device, precision: str):
        self.shown, self.limit, self.bar = shown, None, None
        if not shown:
            return
        from rich.console import Console

        from fasttx.benchmarks.limits import gemm

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with torch.random.fork_rng():
            self.limit = gemm(dtype, device, torch.get_num_threads())
        self.console = Console(stderr=True)
        if self.console.is_terminal:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("step {task.completed}/{task.total}"),
                progress.BarColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[words]}"),
                console=self.console,
            )
            self.task = self.bar.add_task("", completed=step, total=steps, words="")
            self.bar.start()
        self.steps = steps

    def update(self, step: int, entry: dict | None) -> None:
        """entry: what is logged at this step, if anything is."""
        if not self.shown:
            return
        if entry is not None and "loss" in entry:
            words = f"loss {entry['loss']:.4f}  {entry['tokens_per_second']:,.0f} tokens/s"
            if entry.get("share") is not None:
                words += f"  {entry['share']:.1%} of the matmul limit"
        elif entry is not None:
            words = f"evaluation loss {entry['evaluation_loss']:.4f}"
        if self.bar is not None:
            fields = {} if entry is None else {"words": words}
            self.bar.update(self.task, completed=step, **fields)
        elif entry is not None:
            self.console.print(f"step {step}/{self.steps}  {words}", soft_wrap=True)

    def say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Window:
    """What happened since the last log line. The sums are part of a checkpoint, so that a resumed
    run logs the same means; the time is not."""

    def __init__(self, sums: dict | None = None):
        self.sums = sums or {"loss": 0.0, "labelled": 0, "norm": 0.0, "steps": 0}
        self.tokens, self.flops, self.start = 0, 0, time.monotonic()

    def add(self, loss: float, labelled: int, norm: float, tokens: int, flops: int) -> None:
        """loss: the mean over this step's labelled positions."""
        self.sums["loss"] += loss * labelled
        self.sums["labelled"] += labelled
        self.sums["norm"] += norm
        self.sums["steps"] += 1
        self.tokens, self.flops = self.tokens + tokens, self.flops + flops

    def entry(self, limit: float | None) -> dict:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return {
            "loss": self.sums["loss"] / self.sums["labelled"],
            "norm": self.sums["norm"] / self.sums["steps"],
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "share": None if limit is None else round(self.flops / seconds / limit, 4),
        }


def plot_losses(folder: Path) -> Path | None:
    """loss.png from log.jsonl; None where matplotlib is missing or nothing was logged."""
    entries = read_log(folder / "log.jsonl")
    series = {
        name: [(e["step"], e[name]) for e in entries if name in e]
        for name in ("loss", "evaluation_loss")
    }
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not any(series.values()):
        return None
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, words, mark in (("loss", "training", ""), ("evaluation_loss", "evaluation", "o")):
        if series[name]:
            steps, values = zip(*series[name], strict=True)
            axes.plot(steps, values, label=words, marker=mark or None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a labelled token")
    axes.grid(alpha=0.3)
    axes.legend()
    path, temporary = folder / "loss.png", folder / ".loss.png"
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path
