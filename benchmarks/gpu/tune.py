"""Tile tables by measurement: every candidate that fits is compiled in parallel, then timed."""

from __future__ import annotations

import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..harness import CudaClock, interleave
from .record import Item, write_atomically

TUNED = Path(__file__).resolve().parents[2] / "kernels" / "tuned.json"
TOKENS, WIDTH, LENGTH = 16384, 2048, 4096
FEATURES = {
    "light": {"is_causal": True},
    "dropout": {"is_causal": True, "dropout_p": 0.1, "seed": 1},
    "heavy": {"is_causal": True, "softcap": 30.0},
}
KERNELS = ("fwd", "rows", "columns")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
# Below this gain a new tile may be noise: the compiled table's stays.
LEAST_GAIN = 1.02


def items() -> list[Item]:
    found = []
    for width, itemsize, level, kernel in itertools.product(
        (64, 128, 256), DTYPES, FEATURES, KERNELS
    ):
        if itemsize == 4 and (width == 256 or level == "heavy"):
            continue
        key = f"tune/{kernel}/{8 * itemsize}/{width}/{level}"
        arguments = {"kernel": kernel, "itemsize": itemsize, "width": width, "level": level}
        line = f"python -m benchmarks.gpu --only tune --again --match {key}"
        found.append(Item("tune", key, f"{__name__}:tune", arguments, line, 300))
    return found


def candidates(kernel: str, arch: str, itemsize: int, width: int, features: frozenset) -> list:
    from fasttx.kernels.tiles import SHARED_BYTES, Tile, shared_bytes

    limit = SHARED_BYTES.get(arch, 64 << 10)
    most = 128 if itemsize == 2 else 64
    sizes = [n for n in (16, 32, 64, 128) if n <= most]
    found = []
    for m, n, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3, 4)):
        tile = Tile(m, n, warps, stages)
        small = m * n < 1024 or max(m, n) < 32
        # Accumulators beyond what the warps' registers hold: they spill.
        held = (m if kernel != "columns" else 2 * n) * width // (32 * warps)
        if (
            not small
            and held <= 256
            and shared_bytes(kernel, arch, tile, itemsize, width, features) <= limit
        ):
            found.append(tile)
    return found


def _problem(kernel: str, itemsize: int, width: int, level: str):
    import fasttx

    heads = WIDTH // width
    shape = (TOKENS // LENGTH, heads, LENGTH, width)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, g = (
        torch.randn(shape, generator=generator, device="cuda").to(DTYPES[itemsize])
        for _ in range(4)
    )
    options = FEATURES[level] | {"backend": "triton"}
    if kernel == "fwd":
        return lambda: (fasttx.attention(q, k, v, **options),)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fasttx.attention(*leaves, **options)
    return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)


def tune(kernel: str, itemsize: int, width: int, level: str) -> dict[str, Any]:
    """Times every candidate of one entry against the tile in use; right answers only."""
    from fasttx.kernels import tiles
    from fasttx.kernels.launch import device_arch

    arch = device_arch(torch.device("cuda", torch.cuda.current_device()))
    features = frozenset(
        {"band"} | {"light": set(), "dropout": {"dropout"}, "heavy": {"softcap"}}[level]
    )
    key = tiles.tile_key(kernel, itemsize, width, features)
    used = tiles.pick_tile(kernel, arch, itemsize, width, LENGTH, LENGTH, features)
    tried = [t for t in candidates(kernel, arch, itemsize, width, features) if t != used]
    compiled = _compile([(arch, key, _fields(t), kernel, itemsize, width, level) for t in tried])
    call, clock = _problem(kernel, itemsize, width, level), CudaClock(torch.device("cuda"))
    want = call()
    scale = [t.float().abs().max() for t in want]
    rows = []
    for tile, why in zip(tried, compiled, strict=True):
        row = {"tile": _fields(tile), "why": why}
        rows.append(row)
        if why:
            continue
        with tiles.trial(key, tile):
            try:
                far = [
                    ((a - b).float().abs().max() / s).item()
                    for a, b, s in zip(call(), want, scale, strict=True)
                ]
            except RuntimeError as error:
                if "CUDA error" in str(error):
                    raise
                row["why"] = str(error)[-200:]
                continue
            row["seconds"] = min(clock.measure(call, 3)[0] for _ in range(2))
        if not max(far) < 0.02:
            row["why"] = f"wrong by {max(far):.2g} of the largest value"
    good = sorted((r for r in rows if not r["why"]), key=lambda r: r["seconds"])[:4]
    timings = _final(call, clock, tiles, key, used, good)
    best = min(timings, key=lambda name: timings[name].interval.median)
    base = timings["used"].interval.median
    gain = base / timings[best].interval.median
    return {
        "key": key, "arch": arch, "used": _fields(used), "used_us": base * 1e6,
        "best": list(best) if best != "used" else _fields(used), "gain": gain,
        "best_us": timings[best].interval.median * 1e6, "card": torch.cuda.get_device_name(),
        "workload": f"{TOKENS} tokens, length {LENGTH}, {WIDTH // width} heads of {width}",
        "tried": rows,
    }  # fmt: skip


def _final(call, clock, tiles, key: str, used, good: list[dict]) -> dict:
    """The best few against the one in use, in turns."""

    def with_tile(tile):
        def run():
            with tiles.trial(key, tile):
                return call()

        return run

    calls = {"used": with_tile(used)}
    calls |= {tuple(r["tile"]): with_tile(tiles.Tile(*r["tile"])) for r in good}
    return interleave(calls, clock, 2.0)


def _fields(tile) -> list[int]:
    return [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages]


def _compile(jobs: list[tuple]) -> list[str]:
    """Fills Triton's cache on every core; for each job why it is not worth timing, or ""."""
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_one, jobs))


def _compile_one(job: tuple) -> str:
    from fasttx.kernels import tiles
    from fasttx.kernels.compile_check import TARGETS, calls_of, compile_call

    arch, key, fields, kernel, itemsize, width, level = job
    options = FEATURES[level]
    config = {
        "dtype": "bf16" if itemsize == 2 else "fp32", "B": TOKENS // LENGTH, "H": WIDTH // width,
        "G": WIDTH // width, "S": LENGTH, "T": LENGTH, "D": width, "right": 0,
        "dropout": options.get("dropout_p", 0.0), "softcap": options.get("softcap", 0.0),
    }  # fmt: skip
    name = {"fwd": "attention_fwd", "rows": "rows", "columns": "columns"}[kernel]
    try:
        with tiles.trial(key, tiles.Tile(*fields)):
            for call in calls_of(arch, "fwd" if kernel == "fwd" else "bwd", config):
                if name in call.kernel.__name__:
                    compiled = compile_call(call, TARGETS[arch])
                    if compiled.metadata.shared > tiles.SHARED_BYTES[arch]:
                        return f"{compiled.metadata.shared} bytes of shared memory"
    except Exception as error:
        return f"does not compile: {error}"[:300]
    return ""


def adopt(record: Path) -> str:
    """Writes what was gained in a record into kernels/tuned.json."""
    try:
        data = json.loads(record.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{record}: {error}") from None
    table = json.loads(TUNED.read_text())
    taken = 0
    for key, item in data["items"].items():
        result = item["result"]
        if not key.startswith("tune/") or item["status"] != "ok" or result["gain"] < LEAST_GAIN:
            continue
        taken += 1
        table.setdefault(result["arch"], {})[result["key"]] = {
            "tile": result["best"],
            "us": round(result["best_us"], 2),
            "instead_of": result["used"],
            "instead_of_us": round(result["used_us"], 2),
            "workload": result["workload"],
            "card": result["card"],
            "commit": data["machine"]["commit"],
            "versions": {n: data["machine"]["packages"][n] for n in ("torch", "triton")},
        }
    write_atomically(TUNED, json.dumps(table, indent=1, sort_keys=True) + "\n")
    return f"{taken} tiles written to {TUNED}"
