"""The command `fasttx`: info (this machine), explain (what a call would run), bench, tune."""

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__, native
from .cli_inspect import inspect
from .cli_train import train
from .cli_tune import tune

ENVIRONMENT = {
    "FASTTX_NATIVE": "0: leave the native library alone (at install time: do not build it)",
    "FASTTX_CPU_ISA": f"force an instruction set: {', '.join(native.LEVELS)}",
    "FASTTX_STRICT": "1: running the reference because every kernel refused is an error",
    "FASTTX_CHECK": "1: check values in CUDA tensors at once, with a sync",
    "FASTTX_TUNE": "0: leave measured choices alone, fasttx's own and those of `fasttx tune`",
    "FASTTX_CACHE": "folder of what is measured or built for you; ~/.cache/fasttx unless set",
    "FASTTX_GRAPH": "0: generate runs every step from Python and records none",
    "TRITON_INTERPRET": "1: run the Triton kernels on the CPU, slowly, to test them",
    "FASTTX_CUDA": "at build time: 0 leaves the CUDA kernels out, 1 insists on them",
    "FASTTX_CUDA_ARCHS": 'at build time: architectures for nvcc, "80;90a" unless set',
    "FASTTX_NVCC": "at build time: the nvcc to use",
    "CXX": "at build time: the C++ compiler, g++ unless set",
    "MAX_JOBS": "at build time: compilers at once, the number of cores unless set",
    "TORCH_INSTALL": "make: pip's arguments to install torch with",
}
DTYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp64": "float64",
}

UsageError = typer.BadParameter.__base__
ClickException = UsageError.__base__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fast transformer kernels for PyTorch.",
)
explain_app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Say what a call would run, and why not the other kernels.",
)
app.add_typer(explain_app, name="explain")
app.command()(train)
app.command()(inspect)
app.command()(tune)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
):
    if version:
        print(__version__)
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


@explain_app.callback(invoke_without_command=True)
def _explain_root(ctx: typer.Context):
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command()
def info():
    """Versions, devices, instruction sets, the usable backends of each op, the environment."""
    with _refusals():
        native.check_cpu_isa()
    console = Console()
    console.print(_grid("versions", _versions()))
    console.print(_grid("machine", _machine()))
    table = Table(
        title="backends", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in ("op", "device", "backend", "state"):
        table.add_column(column, overflow="fold")
    for op, device, backend, usable, state in _backends():
        table.add_row(op, device, backend, Text(state, style="green" if usable else "yellow"))
    console.print(table)
    console.print()
    console.print(_grid("choices by measurement", _choices()))
    rows = [
        (name, f"{os.environ.get(name) or '(not set)'}  {text}")
        for name, text in ENVIRONMENT.items()
    ]
    console.print(_grid("environment", rows))


@explain_app.command("attention")
def explain_attention(
    shape: Annotated[str, typer.Option(help="The query's B,H,S,D.")] = "8,12,512,64",
    kv_shape: Annotated[
        str | None,
        typer.Option(
            help="The key's and value's B,G,T,D, or B,G,T,D,Dv; the query's unless given."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    causal: Annotated[
        bool, typer.Option(help="Causal, the first query aligned with the first key.")
    ] = False,
    lower_right: Annotated[
        bool,
        typer.Option("--lower-right", help="Causal, the last query aligned with the last key."),
    ] = False,
    mask: Annotated[
        str | None, typer.Option(help="A mask of B|1,H|1,S|1,T|1, floating, or bool:B,1,1,T.")
    ] = None,
    position_bias: Annotated[str | None, typer.Option(help="alibi or relative.")] = None,
    window: Annotated[
        str | None, typer.Option(help="LEFT,RIGHT; an empty side is unbounded.")
    ] = None,
    softcap: Annotated[float | None, typer.Option(help="c of c * tanh(x / c).")] = None,
    dropout: Annotated[float, typer.Option(help="The dropout probability.")] = 0.0,
    backend: Annotated[str | None, typer.Option(help="Insist on this backend.")] = None,
):
    """What fasttx.attention would run, forward and backward, and why not the other kernels.

    fasttx explain attention --shape 8,12,512,64 --dtype bf16 --causal
    """
    import torch

    import fasttx

    q_shape = _ints("--shape", shape, (4,))
    k_shape = _ints("--kv-shape", kv_shape, (4, 5)) if kv_shape else q_shape
    v_shape = (*k_shape[:3], k_shape[-1])
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: choose cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: {_why_no_cuda()}")
    kind = getattr(torch, DTYPES[dtype])

    def tensor(sizes, dtype=kind):
        # One element behind any shape: nothing is computed, so nothing need be stored.
        return torch.zeros(1, dtype=dtype, device=device).expand(sizes)

    query, key, value = tensor(q_shape), tensor(k_shape[:4]), tensor(v_shape)
    with _refusals(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explanation = fasttx.explain(
            fasttx.attention,
            query,
            key,
            value,
            _mask(mask, tensor),
            dropout,
            "lower_right" if lower_right else causal,
            position_bias=_position_bias(position_bias, q_shape[1], tensor),
            window=_window(window),
            softcap=softcap,
            backend=backend,
        )
    table = Table(box=None, pad_edge=False)
    for column in ("", "op", "backend", "why"):
        table.add_column(column, overflow="fold")
    for op, name, why, chosen in explanation.rows:
        style = "bold green" if chosen else None
        table.add_row(
            "->" if chosen else "",
            op,
            name,
            explanation.told(op, why, chosen),
            style=style,
        )
    Console().print(table)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(ctx: typer.Context):
    """Time fasttx beside what else is installed: see `fasttx bench --help`."""
    from fasttx.benchmarks.run import app as benchmarks

    code = benchmarks(ctx.args, prog_name="fasttx bench", standalone_mode=False)
    raise typer.Exit(code if isinstance(code, int) else 0)


def main(args: list[str] | None = None) -> None:
    """Run the command. Wrong input is one line on stderr and exit code 2."""
    try:
        code = app(args, prog_name="fasttx", standalone_mode=False)
    except ClickException as error:
        print(f"fasttx: {' '.join(error.format_message().split())}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _refusals():
    """What the library refuses in words is the caller's mistake, and not worth a traceback."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(str(error)) from None


def _ints(option: str, text: str, counts: tuple[int, ...]) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*\d+\s*", part) for part in parts) or len(parts) not in counts:
        want = " or ".join(map(str, counts))
        raise UsageError(f"{option} {text}: give {want} sizes like 8,12,512,64")
    return tuple(map(int, parts))


def _mask(text, tensor):
    import torch

    if text is None:
        return None
    kind, _, sizes = text.rpartition(":")
    if kind not in ("", "bool"):
        raise UsageError(f"--mask {text}: give sizes like 8,1,1,512, or bool:8,1,1,512")
    sizes = _ints("--mask", sizes, (2, 3, 4))
    return tensor(sizes, torch.bool) if kind else tensor(sizes)


def _position_bias(text, heads, tensor):
    import torch

    import fasttx

    if text is None:
        return None
    if text == "alibi":
        return fasttx.ALiBi(tensor((heads,), torch.float32))
    if text == "relative":
        return fasttx.RelativePositionBias(tensor((32, heads)))
    raise UsageError(f"--position-bias {text}: choose alibi or relative")


def _window(text):
    if text is None:
        return None
    sides = [side.strip() for side in text.split(",")]
    if len(sides) != 2 or not all(re.fullmatch(r"\d*", side) for side in sides):
        raise UsageError(f"--window {text}: give LEFT,RIGHT like 128,0 or 128,")
    left, right = (int(side) if side else None for side in sides)
    return left, right


def _grid(title, rows):
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    table.add_row()
    return table


def _versions():
    yield "fasttx", __version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.release()}"
    for package in ("torch", "triton", "transformers"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def _machine():
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU", f"{_cpu_name()}, {cores} cores, torch uses {torch.get_num_threads()} threads"
    yield "instruction sets", ", ".join(native.supported_levels())
    if reason := native.unavailable():
        yield "native library", f"not available: {reason}"
    else:
        cuda = "with" if native.has_cuda_kernels() else "without"
        size = native.LIBRARY.stat().st_size / 1e6
        yield (
            "native library",
            f"runs {native.cpu_isa()} kernels, {cuda} CUDA kernels ({size:.1f} MB)",
        )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            memory = card.total_memory / 2**30
            yield (
                f"GPU {i}",
                f"{card.name}, compute capability {card.major}.{card.minor}, {memory:.0f} GiB",
            )
    else:
        yield "GPU", f"none: {_why_no_cuda()}"


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"model name\s*:\s*(.*)", file.read()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def _why_no_cuda():
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no CUDA device is visible"


def _backends():
    """(op, device, backend, usable, state) of each kernel in the ops' tables, in their order."""
    import torch

    import fasttx  # noqa: F401  (its import fills the registry)

    from .explain import last_gpu_run
    from .op import OPS

    for op in OPS.values():
        for device, kernels in op.tables.items():
            for kernel in kernels:
                if device == "cuda" and not torch.cuda.is_available():
                    why = _why_no_cuda()
                elif (
                    kernel.needs.env and os.environ.get(kernel.needs.env[0]) != kernel.needs.env[1]
                ):
                    why = "needs " + "=".join(kernel.needs.env)
                else:
                    why = kernel.unavailable()
                usable = "usable when asked for by name" if kernel.needs.by_name else "usable"
                state = why or usable
                if device == "cuda" and kernel.backend != "reference":
                    state += f"; last run on a GPU: {last_gpu_run(op.public, kernel.backend)}"
                yield op.name, device, kernel.backend, why is None, state


def _choices():
    """(whose table, what it has for this machine)."""
    import torch

    from . import choice, choice_tables

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = choice.tables()
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    places = dict.fromkeys(map(choice.place, devices))
    yield "this machine", ", ".join(places)
    if os.environ.get("FASTTX_TUNE") == "0":
        yield "none", "FASTTX_TUNE=0 is set"
        return
    if found.damaged:
        yield "yours", found.damaged
    for whose, tables in (("yours", found.users), ("fasttx's own", found.committed)):
        for table in tables:
            used = any(choice.counts(table, place, whose == "yours") for place in places)
            sizes = (f"{op} {len(e)}" for op, e in table["ops"].items() if e)
            yield (
                whose,
                f"{table['machine']}, {table['threads'] or 'any'} threads, fasttx "
                f"{table['fasttx']}, torch {table['torch']}, {table.get('date', 'no date')}: "
                f"{len(table['ops'])} ops measured, entries: {', '.join(sizes) or 'none'}"
                + ("" if used else " (of another machine or version: not used)"),
            )
    if not found.users and not found.damaged:
        try:
            yield "yours", f"none at {choice_tables.user_file()}: `fasttx tune` measures"
        except OSError as error:
            yield "yours", f"none: {error}"


if __name__ == "__main__":
    main()
