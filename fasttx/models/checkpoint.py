"""Reading a folder of weights: safetensors, sharded too, or by permission a pickle.

Everything is known before anything is read: names, dtypes and shapes come from the headers, which
the safetensors library checks. Tensors are then read straight into the memory of the parameters, in
blocks, so that nothing is held twice.
"""

import ctypes
import json
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from .config import CheckpointError, read_json

__all__ = ["Weights"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCK = 4 << 20  # bytes read before they are checked, while they are in the cache
_TURNED = 64 << 20
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Weights:
    """The tensors of a folder by name: iterated, `shape`, `dtype`, `where` (the file), and `fill`.

    Raises CheckpointError where a file is missing, damaged, or outside of the folder.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.folder = folder
        self._parts: dict[str, tuple] = {}
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.exists():
            self._add(single)
        elif index.exists():
            self._add_shards(index, self._add)
        elif not any((folder / name).exists() for name in _PICKLES):
            raise CheckpointError(
                f"{folder}: no weights: model.safetensors (or its index) is missing"
            )
        elif not allow_pickle:
            raise CheckpointError(
                f"{folder}: its weights are a pickle alone, which can hold code: pass "
                "allow_pickle=True to read it with torch.load(weights_only=True)"
            )
        elif (folder / _PICKLES[0]).exists():
            self._add_pickle(folder / _PICKLES[0])
        else:
            self._add_shards(folder / _PICKLES[1], self._add_pickle)

    def __iter__(self):
        return iter(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._parts[key][2]

    def dtype(self, key: str) -> torch.dtype:
        return self._parts[key][1]

    def where(self, key: str) -> Path:
        return self._parts[key][0]

    def order(self, key: str) -> tuple:
        """A key to sort by: as the disk has them."""
        path, _, _, source = self._parts[key]
        return str(path), 0 if isinstance(source, Tensor) else source

    def fill(self, key: str, out: Tensor) -> None:
        """out, a view of any strides, dtype and device with as many elements in the stored order,
        becomes the tensor. Raises CheckpointError for values that are not finite."""
        path, dtype, shape, source = self._parts[key]
        if isinstance(source, Tensor):
            out.copy_(source.reshape(out.shape))
            self._check_finite(key, out)
            return
        rows = out.reshape(1) if out.dim() == 0 else out
        width = math.prod(rows.shape[1:]) * dtype.itemsize
        if not rows.numel():
            return
        step = max(1, _BLOCK // width)
        direct = rows.is_contiguous() and rows.dtype is dtype and rows.device.type == "cpu"
        turned = rows.dim() == 2 and not rows.is_contiguous() and rows.t().is_contiguous()
        if turned and rows.numel() * dtype.itemsize <= _TURNED:
            step = len(rows)  # torch is fast at turning a whole matrix
        buffer = None
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(source)
                for block in rows.split(step):
                    if direct:
                        _read(file, block)
                    else:
                        if buffer is None:
                            buffer = torch.empty(block.shape, dtype=dtype)
                        part = buffer[: len(block)]
                        _read(file, part)
                        if turned and step == len(rows):
                            block.t().copy_(part.to(block.dtype).t())
                        else:
                            block.copy_(part)
                    self._check_finite(key, block)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{path}: {key} cannot be read: {error}") from error

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        if self.shape(one) != self.shape(other):
            return False
        values = [torch.empty(self.shape(k), dtype=self.dtype(k)) for k in (one, other)]
        for key, value in zip((one, other), values, strict=True):
            self.fill(key, value)
        return torch.equal(*values)

    def _check_finite(self, key: str, t: Tensor) -> None:
        if t.is_floating_point() and not t.sum().isfinite() and not t.isfinite().all():
            raise CheckpointError(f"{self.where(key)}: {key} holds NaN or infinity")

    def _add(self, path: Path, wanted: set[str] | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path}: is not a whole safetensors file: {error}") from error
        for name in names if wanted is None else wanted & names:
            entry = header[name]
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {entry['dtype']}, not one of {', '.join(_DTYPES)}"
                )
            shape, first = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            self._parts[name] = (path, _DTYPES[entry["dtype"]], shape, first)

    def _add_pickle(self, path: Path, wanted: set[str] | None = None) -> None:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # what it raises for damage is of many kinds
            text = str(error).split("\n")[0]
            raise CheckpointError(f"{path}: cannot be read with weights_only: {text}") from error
        if not isinstance(values, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in values.items()
        ):
            raise CheckpointError(f"{path}: must hold a dict of tensors by name")
        for name, value in values.items():
            if wanted is None or name in wanted:
                self._parts[name] = (path, value.dtype, tuple(value.shape), value)

    def _add_shards(self, index: Path, add) -> None:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index}: weight_map must be an object of names and files")
        files: dict[str, set[str]] = {}
        for name, file in shards.items():
            if not isinstance(file, str):
                raise CheckpointError(f"{index}: {name}: the file's name must be a string")
            files.setdefault(file, set()).add(name)
        paths = {file: self._inside(index, file) for file in files}
        for file, names in files.items():
            add(paths[file], names)
            if missing := sorted(names - self._parts.keys()):
                raise CheckpointError(f"{paths[file]}: misses {listed(missing)}")

    def _inside(self, index: Path, file: str) -> Path:
        """The path of a shard: a plain name in the folder, or a link that stays there (or, in a
        cache of the Hugging Face hub, in that model's blobs)."""
        path = self.folder / file
        if Path(file).name != file or "\\" in file or file in (".", "..", ""):
            raise CheckpointError(f"{index}: {file!r} must be the name of a file in the folder")
        if not path.exists():
            raise CheckpointError(f"{path}: the file is missing, named in {index.name}")
        root, real = self.folder.resolve(), path.resolve()
        inside = [root]
        if root.parent.name == "snapshots":
            inside.append(root.parent.parent / "blobs")
        if real.parent not in inside or not real.is_file():
            raise CheckpointError(f"{index}: {file!r} is a link to {real}, outside of the folder")
        return path


def listed(names, most: int = 20) -> str:
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _read(file, out: Tensor) -> None:
    """The next bytes of a file into a contiguous CPU tensor."""
    size = out.numel() * out.element_size()
    memory = memoryview((ctypes.c_char * size).from_address(out.data_ptr())).cast("B")
    done = 0
    while done < size:
        count = file.readinto(memory[done:])
        if not count:
            raise EOFError("the file ended early")
        done += count
