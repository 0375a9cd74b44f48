"""Checkpoints of a run: a folder a step, whole or not there, and no pickle.

`checkpoints/step-00000100/` holds model.safetensors, optimizer.safetensors, random.safetensors and
state.json. It is written under another name, brought to the disk and renamed, so that a process
killed at any moment, or a full disk, leaves the checkpoints before it as they were.
"""

import contextlib
import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .parallel import full, like

__all__ = ["Checkpoint", "checkpoints", "clean", "load", "prune", "random_state", "save",
           "set_random_state", "write_whole"]  # fmt: skip

FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """step; path; state: what state.json holds beside the files' sizes."""

    step: int
    path: Path
    state: dict


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted(p for p in found if re.fullmatch(r"step-\d{8,}", p.name))


def step_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def clean(folder: Path) -> None:
    """Remove what an interrupted save left."""
    for path in folder.glob(".step-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path):
    """No second process trains into the folder meanwhile; a killed one holds nothing.

    Raises ValueError.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains into {folder}") from None
        yield


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensor by name, name by name of a tied one) of the state_dict. Collective under FSDP."""
    tensors, tied, seen = {}, {}, {}
    for name, t in model.state_dict().items():
        local = t.to_local() if hasattr(t, "to_local") else t
        key = (local.data_ptr(), t.shape, t.dtype)
        if local.numel() and key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = full(t)
    return tensors, tied


def optimizer_tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """exp_avg, exp_avg_sq and step of every parameter, by name. Collective under FSDP."""
    return {
        f"{key}.{name}": full(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def seed_all(seed: int) -> None:
    """The generators of random_state."""
    import numpy as np

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def random_state() -> dict[str, Tensor]:
    """The generators of torch (CPU and every GPU), Python and numpy."""
    import numpy as np

    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": _bytes([version, list(words), gauss]),
        "numpy": _bytes([kind, keys.tolist(), *rest]),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        state |= {f"cuda{i}": s for i, s in enumerate(states)}
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    import numpy as np

    torch.set_rng_state(state["torch"])
    version, words, gauss = _value(state["python"])
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = _value(state["numpy"])
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    for name, value in state.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(value, int(name.removeprefix("cuda")))


def _bytes(value) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()


def _value(tensor: Tensor):
    return json.loads(bytes(tensor.tolist()))


def save(folder: Path, step: int, parts: tuple[dict[str, Tensor], ...], state: dict) -> Path:
    """Write one checkpoint from the tensors of FILES; nothing changes where one of that step is.

    Raises OSError, with nothing left behind.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    if final.is_dir():
        return final
    with replaced(final, temporary):
        for name, tensors in zip(FILES, parts, strict=True):
            save_tensors(temporary / name, tensors)
        sizes = {name: (temporary / name).stat().st_size for name in FILES}
        text = json.dumps({"step": step, "files": sizes} | state, indent=1)
        (temporary / STATE).write_text(text + "\n", encoding="utf-8")
    _to_disk(folder)
    return final


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        tensors = {k: t.detach().contiguous() for k, t in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def replaced(folder: Path, temporary: Path):
    """What is written to `temporary` takes the place of `folder` at once, or is removed."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield
        for path in (*temporary.iterdir(), temporary):
            _to_disk(path)
        before = temporary.with_name(f"{temporary.name}.gone")
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)
        temporary.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder: Path, keep: int, spare: int | None = None) -> None:
    """Remove all but the newest `keep` and the one of step `spare`."""
    for path in checkpoints(folder)[:-keep]:
        if step_of(path) != spare:
            gone = path.with_name(f".{path.name}.gone")
            with contextlib.suppress(OSError):  # first out of sight, so that none is half there
                path.rename(gone)
                shutil.rmtree(gone)


def read(path: Path) -> Checkpoint:
    """state.json, once the files are as long as it says.

    Raises ValueError naming the file and what to do.
    """
    advice = f"remove {path} to go on from the checkpoint before it"
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        step, sizes = state.pop("step"), state.pop("files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / STATE} is damaged ({error}); {advice}") from None
    for name in FILES:
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != sizes.get(name):
            what = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{file} {what} instead of {sizes.get(name)} bytes; {advice}")
    return Checkpoint(step, path, state)


def load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def load_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    tensors = load_tensors(checkpoint.path / FILES[0])
    for name, source in checkpoint.state["tied"].items():
        tensors[name] = tensors[source]
    own = model.state_dict()
    wrong = [f"{n} is missing" for n in own if n not in tensors]
    wrong += [f"{n} is not in the model" for n in tensors if n not in own]
    wrong += [
        f"{n} is {list(tensors[n].shape)} and {list(t.shape)} in the model"
        for n, t in own.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{checkpoint.path} is of another model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({n: like(own[n], t) for n, t in tensors.items()})


def load(checkpoint: Checkpoint, model: nn.Module, optimizer, rank: int) -> None:
    """Put back model, optimizer and this process's generators."""
    load_model(checkpoint, model)
    tensors = load_tensors(checkpoint.path / FILES[1])
    for name, p in model.named_parameters():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"{key}.{name}")) is not None:
                state[key] = value.to(p.device) if key == "step" else like(p, value)
        if state:
            optimizer.state[p] = state
    own, prefix = load_tensors(checkpoint.path / FILES[2]), f"{rank}."
    set_random_state({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)})


def write_whole(path: Path, text: str) -> None:
    """Replace a text file at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
