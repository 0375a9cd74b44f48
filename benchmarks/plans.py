"""What a run of models, layers, training and generation consists of."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import fresh
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


def models(session) -> list[Step]:
    """The steps of everything that is not an op."""
    options, steps = session.options, []
    if "bert" in options.models:
        steps += _bert(session)
    kinds = (
        (_family, [name for name in options.models if name != "bert"]),
        (_layer, options.layers),
        (_train, options.training),
        (_generate, options.generation),
    )
    for plan, names in kinds:
        for name in names:
            try:
                steps += plan(session, name)
            except (ImportError, ValueError) as why:
                session.run.skip(name, str(why))
    return steps


def threads_of_models(options) -> tuple[int, ...]:
    """The thread counts asked for; if none were, also all cores, as a user would run it."""
    chosen = options.threads
    if options.default_threads:
        chosen = tuple(dict.fromkeys((*chosen, len(os.sched_getaffinity(0)))))
    return chosen


def _seconds(session, table: dict[str, float]) -> float:
    return session.options.budget_s or table[session.options.suite]


def _compiled(session) -> bool:
    return session.options.suite == "full" or "torch_compile" in session.options.providers


def _wanted(session, direction: str) -> bool:
    return session.options.default_directions or direction in session.options.directions


def add_fresh(
    session, rows: list[Row], make: str, threads: int, memory: bool = False, **arguments
) -> list[Row]:
    """Fills in what was asked for of cold start and peak memory, from fresh processes."""
    options = session.options
    for row in rows:
        if not fresh_provider(row):
            continue
        ask = partial(
            fresh.measure, make, arguments | {"provider": row.provider}, threads=threads,
            device=str(session.device), transformers=row.kind != "op",
        )  # fmt: skip
        if options.cold:
            row.cold_s = ask("cold")
        if options.memory or memory:
            row.peak_bytes = ask("memory")
    return rows


def fresh_provider(row: Row) -> bool:
    """Other runtimes have processes, or conversions, of their own."""
    return row.ours or row.provider in (*APART, "torch_compile")


def _bert(session) -> list[Step]:
    options = session.options
    seconds = _seconds(session, MODEL_SECONDS)
    every, first = threads_of_models(options), options.threads
    dtypes = options.dtypes
    jobs = [(d, i, "forward", t) for i in (1, 0) for d in dtypes for t in first]
    jobs += [(dtype, 1, "step", first[0]) for dtype in dtypes]
    jobs += [(d, 0, "forward", t) for d in dtypes for t in every if t not in first]
    kept: dict[str, object] = {}

    def bench(dtype: str):
        """The models of one dtype, kept for its next rows."""
        if dtype not in kept:
            try:
                bert = importlib.import_module(".models.bert", __package__)
                kept["source"] = kept.get("source") or bert.load(session.device)
                kept[dtype] = bert.Bench(kept["source"], dtype, session.device, session.run)
            except ImportError as missing:
                session.run.skip("BERT", str(missing))
                kept[dtype] = None
        return kept[dtype]

    def measure(budget, on_round, dtype, batch, direction, threads):
        torch.set_num_threads(threads)
        found = bench(dtype)
        if found is None:
            return []
        name = list(found.source.batches)[batch]
        return found.measure(name, direction, threads, budget, on_round)

    steps = []
    for dtype, batch, direction, threads in jobs:
        text = ("sentences", "paragraphs")[batch]
        title = f"BERT on {text} {dtype} {direction}, {threads} thr."
        about = {"dtype": dtype, "batch": batch, "direction": direction, "threads": threads}
        steps.append(Step(title, seconds, partial(measure, **about)))
    return steps


def _family(session, name: str) -> list[Step]:
    """One family, or a folder; its models of one dtype live until the next dtype's."""
    families = importlib.import_module(".models.families", __package__)
    source = families.source_of(name)
    options, holder = session.options, {}
    threads = options.threads[0]
    peers = {n: p for n, p in session.providers.items() if hasattr(p, "model_forward")}
    if options.suite != "full":
        peers = {n: p for n, p in peers.items() if n in options.providers}

    def measure(budget, on_round, dtype, direction, size):
        torch.set_num_threads(threads)
        if dtype not in holder:
            holder.clear()
            holder[dtype] = families.Bench(
                source, dtype, session.device, session.run, _compiled(session), peers
            )
        rows = holder[dtype].measure(direction, size, threads, budget, on_round)
        about = {"source": name, "dtype": dtype, "direction": direction, "size": size}
        about["memory"] = name not in families.FAMILIES and direction == "step"
        return add_fresh(session, rows, "models.families:fresh", threads, **about)

    seconds = _seconds(session, MODEL_SECONDS)
    return [
        Step(
            f"{source.title} {dtype} {direction} {size[0]} x {size[1]}", seconds,
            partial(measure, dtype=dtype, direction=direction, size=size),
        )
        for dtype in options.dtypes
        for direction, sizes in source.batches.items()
        if _wanted(session, direction)
        for size in sizes
    ]  # fmt: skip


def _layer(session, name: str) -> list[Step]:
    layers = importlib.import_module(".models.layers", __package__)
    options, holder = session.options, {}
    threads = options.threads[0]
    compiled = not options.providers or _compiled(session)
    sizes = ((options.batch, size) for size in options.sizes) if options.sizes else layers.SIZES

    def measure(budget, on_round, dtype, direction, size):
        torch.set_num_threads(threads)
        if (dtype, size) not in holder:
            holder.clear()
            holder[dtype, size] = layers.Bench(
                name, dtype, size, session.device, session.run, compiled
            )
        rows = holder[dtype, size].measure(direction, threads, budget, on_round)
        about = {"name": name, "dtype": dtype, "direction": direction, "size": size}
        return add_fresh(session, rows, "models.layers:fresh", threads, **about)

    seconds = _seconds(session, LAYER_SECONDS)
    return [
        Step(
            f"{name} layer {dtype} {direction} {size[0]} x {size[1]}", seconds,
            partial(measure, dtype=dtype, direction=direction, size=size),
        )
        for dtype in options.dtypes
        for size in sizes
        for direction in layers.DIRECTIONS
        if _wanted(session, direction)
    ]  # fmt: skip


def _train(session, name: str) -> list[Step]:
    train = importlib.import_module(".models.train", __package__)
    options, holder, work = session.options, {}, train.job(name)
    threads = options.threads[0]

    def measure(budget, on_round, dtype, size):
        torch.set_num_threads(threads)
        if dtype not in holder:
            holder.clear()
            holder[dtype] = train.Bench(
                work, dtype, session.device, session.run, _compiled(session)
            )
        rows = holder[dtype].measure(size, threads, budget, on_round)
        about = {"name": name, "dtype": dtype, "size": size}
        return add_fresh(session, rows, "models.train:fresh", threads, **about)

    seconds = _seconds(session, MODEL_SECONDS)
    return [
        Step(
            f"training {work.title} {dtype} {size[0]} x {size[1]}", seconds,
            partial(measure, dtype=dtype, size=size),
        )
        for dtype in options.dtypes
        for size in work.sizes
    ]  # fmt: skip


def _generate(session, name: str) -> list[Step]:
    """A model that generates; those of one dtype live until the next dtype's."""
    generate = importlib.import_module(".models.generate", __package__)
    options, holder = session.options, {}
    peers = {n: p for n, p in session.providers.items() if hasattr(p, "generation")}

    def measure(budget, on_round, dtype, batch, threads):
        torch.set_num_threads(threads)
        if dtype not in holder:
            holder.clear()
            holder[dtype] = generate.Bench(name, dtype, session.device, session.run, peers)
        rows = holder[dtype].measure(batch, threads, budget, on_round)
        about = {"name": name, "dtype": dtype, "batch": batch}
        return add_fresh(session, rows, "models.generate:fresh", threads, **about)

    seconds = _seconds(session, MODEL_SECONDS)
    return [
        Step(
            f"generation by {name} {dtype}, {batch} a batch, {threads} thr.", seconds,
            partial(measure, dtype=dtype, batch=batch, threads=threads),
        )
        for dtype in options.dtypes
        for batch in generate.BATCHES
        for threads in threads_of_models(options)
    ]  # fmt: skip
