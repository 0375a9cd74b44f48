"""The training loop, for any module whose forward(**batch) gives a loss."""

import contextlib
import dataclasses
import math
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint as files
from .batches import check_batch, labelled, loss_of, tokens, without_dropout
from .monitor import Display, Log, Window, plot_losses, training_flops
from .optimizer import learning_rate, make_optimizer
from .options import ConfigError, TrainOptions
from .parallel import Group, full
from .recompute import recomputed
from .tokenizer import Tokenizer, check_tokenizer, remember_tokenizer

__all__ = ["Result", "TrainingError", "fit"]

# What may differ between a checkpoint and the run that goes on from it.
FREE = {"keep", "log_every", "save_every", "device"}


class TrainingError(RuntimeError):
    """Training stopped; the last good checkpoint, named in the message, is whole."""


@dataclass(frozen=True)
class Result:
    """steps: done in all. loss: the mean of the last log line. evaluation_loss: the last one;
    best_loss and best_step: the lowest. stopped: None at the end, "patience", or a signal's name.
    checkpoint: the newest."""

    steps: int
    loss: float | None
    evaluation_loss: float | None
    best_loss: float | None
    best_step: int | None
    stopped: str | None
    checkpoint: Path


def fit(
    model: nn.Module,
    examples,
    folder: str | Path,
    *,
    options: TrainOptions | None = None,
    evaluation=None,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    progress: bool = False,
    identity: dict | None = None,
    **changes,
) -> Result:
    """Train `model` and keep checkpoints/, log.jsonl, loss.png and, at the end, model/ in `folder`.

    The loss of a step is the mean over all labelled positions of its batch, whatever the micro
    batches and processes that share it. Which rows a step has, and their noise, are functions of
    (options.seed, step); with the generators, the optimizer and the model in each checkpoint a
    resumed run continues bit for bit (same machine, threads and number of processes).

    Args:
        model: forward(**batch) gives the mean loss over labels other than -100: an output with
            .loss or ["loss"], a tuple that begins with it, or the loss itself.
        examples: of an objective (Objective.examples), Rows(dataset, collate), or what has
            __len__ and batch(indices, epochs) -> dict of tensors, an epoch for each row. A causal
            model's labels must be -100 where nothing predicts them, at the first of a row.
        folder: made where it is missing. Refused where it holds checkpoints and `resume` is False.
        options: a TrainOptions; changes: fields of it, by name.
        evaluation: examples to evaluate on, by options.evaluate_every and at the end.
        tokenizer: saved with the model, whose config remembers it.
        resume: go on from the newest checkpoint, or begin where there is none.
        progress: show a bar (a line now and then where there is no terminal).
        identity: what else must be the same in a run that goes on: compared with the checkpoint's.

    SIGINT and SIGTERM save and stop after the step (a second SIGINT stops at once). Under torchrun
    the model is trained by options.parallel.

    Raises:
        ConfigError, ValueError: before anything is trained, naming what is wrong.
        TrainingError: a loss or gradient that is not finite, a checkpoint that cannot be written.
    """
    given = {} if options is None else dataclasses.asdict(options)
    if unknown := sorted(set(changes) - {f.name for f in dataclasses.fields(TrainOptions)}):
        raise TypeError(f"fit: unknown {', '.join(unknown)}")
    options = TrainOptions(**given | changes)
    with Group(options.device, options.parallel) as group:
        run = _Run(model, examples, Path(folder), options, evaluation, tokenizer, group, identity)
        return run(resume, progress)


class _Run:
    def __init__(self, model, examples, folder, options, evaluation, tokenizer, group, identity):
        self.model, self.examples, self.evaluation = model, examples, evaluation
        self.folder, self.options, self.group = folder, options, group
        self.tokenizer = tokenizer
        self.saves = folder / "checkpoints"
        self.micro = _micro_batch(options, group.world, len(examples))
        if evaluation is not None and len(evaluation) == 0:
            raise ValueError("evaluation has no rows")
        if options.patience is not None and evaluation is None:
            raise ValueError("patience needs evaluation")
        self.steps = options.steps or math.ceil(options.epochs * len(examples) / options.batch_size)
        own = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
        own |= {"rows": len(examples), "processes": group.world, **(identity or {})}
        if tokenizer is not None:
            own["tokenizer"] = tokenizer.fingerprint
        self.identity = own | {"betas": list(options.betas)}
        self.step, self.best_loss, self.best_step, self.worse = 0, None, None, 0
        self.loss = self.evaluation_loss = self.stop = self.signal = None
        self.order = (-1, None)

    def __call__(self, resume: bool, progress: bool) -> Result:
        options, group = self.options, self.group
        if self.tokenizer is not None:
            check_tokenizer(self.model, self.tokenizer)
            remember_tokenizer(self.model, self.tokenizer)
        check_batch(self.model, self.examples.batch([0, len(self.examples) - 1], 0))
        found = self._checkpoint(resume)
        with files.alone(self.folder) if group.leads else contextlib.nullcontext():
            if group.leads:
                files.clean(self.saves)
            files.seed_all(options.seed + group.rank)
            self._prepare_and_train(found, progress)
            return self._end()

    def _prepare_and_train(self, found: files.Checkpoint | None, progress: bool) -> None:
        options, group, mode = self.options, self.group, self.model.training
        self.window = Window()
        self.model.train()
        with contextlib.ExitStack() as during:
            during.callback(self.model.train, mode)
            during.enter_context(_without_cache(self.model))
            if options.gradient_checkpointing:
                during.enter_context(recomputed(self.model))
            self.wrapped = group.wrap(self.model)
            self.optimizer = make_optimizer(self.model, options)
            if found is not None:
                files.load(found, self.model, self.optimizer, group.rank)
                self._restore(found)
            self.log = Log(self.folder / "log.jsonl", self.step) if group.leads else None
            shown = progress and group.leads
            self.display = Display(shown, self.step, self.steps, group.device, options.precision)
            during.callback(self.display.close)
            during.enter_context(_signals(self))
            if found is not None:
                self.display.say(f"going on from step {self.step}")
            self._train()

    def _checkpoint(self, resume: bool) -> files.Checkpoint | None:
        """The newest, held to this run's identity."""
        found = files.checkpoints(self.saves)
        if found and not resume:
            raise ValueError(
                f"{self.folder} holds a run (its newest checkpoint is {found[-1].name}): go on "
                "with resume, or choose another folder"
            )
        if not found:
            return None
        newest = files.read(found[-1])
        before = newest.state["identity"]
        differing = [
            f"{name}: {_short(before.get(name))} there, {_short(self.identity.get(name))} here"
            for name in sorted(before.keys() | self.identity.keys())
            if before.get(name) != self.identity.get(name)
        ]
        if differing:
            raise ConfigError(differing, f"{newest.path} is from another config")
        return newest

    def _restore(self, found: files.Checkpoint) -> None:
        state = found.state
        self.step = found.step
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self.worse, self.loss = state["worse"], state["loss"]
        self.evaluation_loss = state["evaluation_loss"]
        self.window = Window(state["window"])
        if state["patience_is_over"]:
            self.stop = "patience"

    def _train(self) -> None:
        options = self.options
        while self.step < self.steps and self.stop is None:
            self._step()
            self.step += 1
            last = self.step == self.steps
            self.display.update(self.step, None)
            if last or self.step % options.log_every == 0:
                self._log()
            saving = last or _due(self.step, options.save_every)
            if self.evaluation is not None and (last or _due(self.step, options.evaluate_every)):
                saving |= self._evaluate()
            if self.group.sum(self.signal is not None)[0] and not last:
                self.stop = self.signal or "another process was stopped"
            if saving or self.stop is not None:
                self._save()

    def _step(self) -> None:
        options, group = self.options, self.group
        batches = [self._batch(*rows) for rows in self._rows(self.step)]
        counts = [labelled(batch) for batch in batches]
        total, none, *sizes = group.sum(sum(counts), 0 in counts, *tokens(self.model, batches))
        if total == 0 or (group.world > 1 and none):
            self._fail("a batch has no labelled position")
        device, loss = group.device, 0.0
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            if count == 0:
                continue
            with group.accumulating(self.wrapped, i == len(batches) - 1):
                with autocast(device, options.precision):
                    mean = loss_of(self.wrapped(**batch))
                # The processes' gradients are averaged.
                (mean * (count / total * group.world)).backward()
            loss = loss + mean.detach().double() * (count / total)
        norm = full(nn.utils.get_total_norm(self._gradients()))
        loss, norm = torch.stack([loss.to(device), norm.double().to(device)]).tolist()
        (loss,) = group.sum(loss)
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = "the loss" if not math.isfinite(loss) else "the norm of the gradients"
            self._fail(
                f"{what} is {norm if math.isfinite(loss) else loss}; try a smaller learning_rate, "
                "a longer warmup or clip, and look at the rows of this step"
            )
        if options.clip is not None:
            scale = min(1.0, options.clip / (norm + 1e-6))
            if scale < 1:
                torch._foreach_mul_(self._gradients(), scale)
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate(options, self.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        source, target = map(int, sizes)
        flops = training_flops(self.model, source, target, int(total)) if self.display.shown else 0
        self.window.add(loss, int(total), norm, source + target, flops)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _rows(self, step: int) -> list[tuple[list[int], list[int]]]:
        """(indices, epochs) of this process's micro batches: a function of seed and step."""
        own = self.options.batch_size // self.group.world
        first = step * self.options.batch_size + self.group.rank * own
        rows = [self._row(position) for position in range(first, first + own)]
        parts = (rows[start : start + self.micro] for start in range(0, own, self.micro))
        return [tuple(map(list, zip(*part, strict=True))) for part in parts]

    def _row(self, position: int) -> tuple[int, int]:
        epoch, at = divmod(position, len(self.examples))
        if self.order[0] != epoch:
            rng = np.random.default_rng([self.options.seed, epoch, 1])
            self.order = epoch, rng.permutation(len(self.examples))
        return int(self.order[1][at]), epoch

    def _batch(self, indices, epochs, examples=None) -> dict:
        batch = (self.examples if examples is None else examples).batch(indices, epochs)
        check_batch(self.model, batch)
        device = self.group.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _evaluate(self) -> bool:
        """Whether this was the best, which is kept where patience asks for it."""
        self.evaluation_loss = self._evaluation_loss()
        self._write({"step": self.step, "evaluation_loss": self.evaluation_loss})
        if self.best_loss is None or self.evaluation_loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = self.evaluation_loss, self.step, 0
            return self.options.patience is not None
        self.worse += 1
        if self.options.patience is not None and self.worse >= self.options.patience:
            self.stop = self.stop or "patience"
        return False

    def _evaluation_loss(self) -> float:
        """The mean over labelled positions, with the noise of epoch 0 every time."""
        options, group, total, count = self.options, self.group, 0.0, 0
        rows = len(self.evaluation)
        starts = list(range(0, rows, self.micro))[: options.evaluation_batches]
        rounds = range(0, len(starts), group.world)
        devices = [group.device] if group.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), without_dropout(self.model):
            for first in rounds:
                at = first + group.rank
                start = starts[min(at, len(starts) - 1)]
                indices = range(start, min(start + self.micro, rows))
                batch = self._batch(indices, 0, self.evaluation)
                with autocast(group.device, options.precision):
                    loss = loss_of(self.wrapped(**batch))
                if at < len(starts) and (own := labelled(batch)):
                    total, count = total + loss.item() * own, count + own
        total, count = group.sum(total, count)
        if not count or not math.isfinite(total):
            self._fail(f"the evaluation loss is {total if count else 'of no labelled position'}")
        return total / count

    def _log(self) -> None:
        entry = {"step": self.step, **self.window.entry(self.display.limit)}
        entry["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.loss = entry["loss"]
        self.window = Window()
        self._write(entry)

    def _write(self, entry: dict) -> None:
        if self.log is not None:
            with self._or_fail("log.jsonl"):
                self.log.write(**entry)
        self.display.update(self.step, entry)

    def _save(self) -> None:
        model, tied = files.tensors_of(self.model)
        optimizer = files.optimizer_tensors(self.model, self.optimizer)
        generators = self.group.gather(files.random_state())
        state = {
            "identity": self.identity,
            "tied": tied,
            "window": self.window.sums,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "worse": self.worse,
            "loss": self.loss,
            "evaluation_loss": self.evaluation_loss,
            "patience_is_over": self.stop == "patience",
        }
        error = None
        if self.group.leads:
            try:
                parts = model, optimizer, generators
                files.save(self.saves, self.step, parts, state)
                spare = self.best_step if self.options.patience is not None else None
                files.prune(self.saves, self.options.keep, spare)
            except OSError as caught:
                error = caught
        if self.group.sum(error is not None)[0]:
            self._fail(f"the checkpoint cannot be written: {error or 'see the first process'}")

    def _end(self) -> Result:
        finished = self.stop is None or self.stop == "patience"
        if finished and self.stop == "patience" and self.best_step is not None:
            best = files.read(self.saves / f"step-{self.best_step:08d}")
            files.load_model(best, self.model)
        if finished:
            self._keep_model()
        if self.group.leads:
            with self._or_fail("loss.png"):
                plot_losses(self.folder)
        return Result(
            self.step, self.loss, self.evaluation_loss, self.best_loss, self.best_step,
            self.stop, files.checkpoints(self.saves)[-1],
        )  # fmt: skip

    def _keep_model(self) -> None:
        """model/: what the model saves of itself, or its tensors, and the tokenizer."""
        tensors, tied = files.tensors_of(self.model)
        if not self.group.leads:
            return
        folder, temporary = self.folder / "model", self.folder / ".model"
        with self._or_fail("model"), files.replaced(folder, temporary):
            if hasattr(self.model, "save_pretrained"):
                sharded = any(hasattr(t, "full_tensor") for t in self.model.state_dict().values())
                whole = tensors | {name: tensors[source] for name, source in tied.items()}
                self.model.save_pretrained(temporary, **({"state_dict": whole} if sharded else {}))
            else:
                files.save_tensors(temporary / files.FILES[0], tensors)
            if self.tokenizer is not None:
                self.tokenizer.save(temporary)

    @contextlib.contextmanager
    def _or_fail(self, what: str):
        try:
            yield
        except OSError as error:
            self._fail(f"{what} cannot be written: {error}")

    def _fail(self, reason: str):
        kept = files.checkpoints(self.saves)
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was made yet"
        raise TrainingError(f"step {self.step + 1}: {reason}; {where}") from None


def _micro_batch(options: TrainOptions, world: int, rows: int) -> int:
    batch = options.batch_size
    if rows < batch:
        raise ValueError(
            f"the corpus has {rows} rows, fewer than one batch of {batch}: give more text, or "
            "make batch_size or the objective's length smaller"
        )
    if batch % world:
        raise ValueError(f"batch_size {batch} must be a multiple of the {world} processes")
    micro = options.micro_batch_size or batch // world
    if batch // world % micro:
        raise ValueError(
            f"batch_size {batch} over {world} processes must be a multiple of micro_batch_size "
            f"{micro}"
        )
    return micro


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def autocast(device: torch.device, precision: str):
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextlib.contextmanager
def _without_cache(model: nn.Module):
    """transformers' models keep no keys and values while they train: with a cache they would also
    take packed documents for one."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before


@contextlib.contextmanager
def _signals(run: _Run):
    """SIGINT and SIGTERM ask for a stop after this step; a second SIGINT interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number, _):
        run.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
