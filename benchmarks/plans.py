"""What a run of models, layers, training and generation consists of."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from . import fresh
from .contest import Case
from .models import families
from .rows import Row

MODEL_SECONDS = {"quick": 5.0, "full": 15.0, "musts": 15.0}
LAYER_SECONDS = {"quick": 2.5, "full": 8.0, "musts": 8.0}
APART = ("transformers", "torch_nn", "fasttx_torch_nn", "dynamic", "static", "sdpa", "eager")


@dataclass
class Step:
    """A group of rows timed against each other; ``seconds`` is what it may take."""

    title: str
    seconds: float
    measure: Callable[[float, Callable], list[Row]]


@dataclass(frozen=True)
class Kind:
    """asked: where Options has its names. module: who offers its cases. beside: whether peers
    are in every run that names no provider."""

    asked: str
    module: str
    seconds: dict[str, float]
    beside: bool = False


KINDS = (
    Kind("models", "families", MODEL_SECONDS),
    Kind("layers", "layers", LAYER_SECONDS, beside=True),
    Kind("training", "train", MODEL_SECONDS),
    Kind("generation", "generate", MODEL_SECONDS, beside=True),
)
BERT = Kind("models", "bert", MODEL_SECONDS)


def models(session) -> list[Step]:
    """The steps of everything that is not an op."""
    holder: dict[tuple, object] = {}
    return [
        Step(case.title, seconds(session, kind), partial(_measure, session, kind, case, holder))
        for kind, case in cases(session)
    ]


def cases(session) -> Iterator[tuple[Kind, Case]]:
    """The groups of models, layers, training and generation that were asked for."""
    options = session.options
    named = [(kind, name) for kind in KINDS for name in getattr(options, kind.asked)]
    for kind, name in named:
        kind = BERT if (kind.asked, name) == ("models", "bert") else kind
        try:
            families.quiet()
            found = list(module_of(kind).cases(name, options))
        except (ImportError, ValueError) as why:
            session.run.skip(name, str(why))
            continue
        if not found:
            session.run.skip(name, f"it has no {', '.join(options.directions)}")
        for case in found:
            yield kind, case


def module_of(kind: Kind):
    return importlib.import_module(f".models.{kind.module}", __package__)


def seconds(session, kind: Kind) -> float:
    return session.options.budget_s or kind.seconds[session.options.suite]


def _measure(session, kind: Kind, case: Case, holder: dict, budget: float, on_round) -> list[Row]:
    """The models of one Bench live until the next Bench's."""
    options, module = session.options, module_of(kind)
    torch.set_num_threads(case.threads)
    key = (kind.module, *case.made.items())
    if key not in holder:
        holder.clear()
        everyone = options.suite == "full" or (kind.beside and not options.providers)
        chosen = session.providers if everyone else options.providers
        beside = {n: p for n, p in session.providers.items() if n in chosen}
        holder[key] = module.Bench(
            **case.made, device=session.device, run=session.run, beside=beside
        )
    rows = holder[key].measure(case.threads, budget, on_round, **case.given)
    about = case.made | case.given
    return add_fresh(
        session, rows, f"models.{kind.module}:fresh", case.threads, case.memory, **about
    )


def add_fresh(
    session, rows: list[Row], make: str, threads: int, memory: bool = False, **arguments
) -> list[Row]:
    """Fills in what was asked for of cold start and peak memory, from fresh processes."""
    options, apart = session.options, [row for row in rows if fresh_provider(row)]

    def ask(what: str, row: Row) -> float | None:
        given, device = arguments | {"provider": row.provider}, str(session.device)
        return fresh.measure(make, given, what, threads, device, transformers=row.kind != "op")

    if options.cold:
        for row in apart:
            row.cold_s = ask("cold", row)
    if options.memory or memory:
        # Unlike time, it does not change beside another process; a GPU's may not be enough for two.
        with ThreadPoolExecutor(2 if session.device.type == "cpu" else 1) as pool:
            for row, peak in zip(apart, pool.map(partial(ask, "memory"), apart), strict=True):
                row.peak_bytes = peak
    return rows


def fresh_provider(row: Row) -> bool:
    """Other runtimes have processes, or conversions, of their own."""
    return row.ours or row.provider in (*APART, "torch_compile")
