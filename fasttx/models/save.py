"""Models into folders that transformers reads, whole or not at all."""

import ctypes
import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from . import families
from .heads import BaseModel, architecture
from .names import stored

__all__ = ["save_pretrained"]

_OURS = ("config.json", "generation_config.json")
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
# Fields that a folder's weights decide, or its architecture.
_OPEN = (
    "generation",
    "max_positions",
    "num_labels",
    "pooler",
    "positions",
    "shared",
    "source",
    "tied",
    "topology",
)


def save_pretrained(model: BaseModel, folder, *, max_shard_bytes: int | None = None) -> None:
    """Write config.json and model.safetensors (with max_shard_bytes in shards, and their index) as
    transformers and fasttx.from_pretrained read them; other files of the folder stay.

    The new folder is written beside the old one and takes its place in one step: a save that is
    killed leaves the old folder whole, and beside it a folder named .NAME.saving-*. Where a step
    of that kind is not possible (not Linux, folders inside of the folder) the files are replaced
    one by one, weights first.

    Raises:
        ValueError: the config has no words for the model, or the folder is a file.
        OSError: it cannot be written; the old folder is whole.
    """
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise ValueError(f"max_shard_bytes must be None or at least 1, got {max_shard_bytes!r}")
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise ValueError(f"folder must be a folder or new, got the file {target}")
    config = _config(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    try:
        _write_json(new / "config.json", config)
        if model.config.generation:
            _write_json(new / "generation_config.json", model.config.generation)
        _write_weights(new, _tensors(model), max_shard_bytes)
        new.chmod(target.stat().st_mode & 0o7777 if target.exists() else 0o777 & ~_umask())
        _take_place(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _config(model: BaseModel) -> dict:
    config = model.config
    written = families.configured(config.source)
    changed = [
        f.name
        for f in fields(config)
        if f.name not in _OPEN and getattr(config, f.name) != getattr(written, f.name)
    ]
    if changed:
        raise ValueError(f"config: a folder has no words for the changed {', '.join(changed)}")
    values = {k: v for k, v in config.source.items() if k != "torch_dtype"}
    if config.num_labels != written.num_labels:
        values["num_labels"] = config.num_labels
    values["architectures"] = [architecture(config, model.kind)]
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    return values


def _tensors(model: BaseModel) -> dict[str, Tensor]:
    """Every tensor under its name in a folder, as it is stored there."""
    family, state = families.FAMILIES[model.config.family], model.state_dict()
    prefix = "" if model.kind in family.bare else family.prefix
    tensors = {}
    for name, place in stored(model):
        views = place.views(state[name].detach())
        for plain, shape, view in zip(place.names, place.shapes, views, strict=True):
            full = prefix + plain if place.base else plain
            tensors[full] = view.reshape(shape).cpu().contiguous()
    if not model.config.tied:  # transformers adds the bias under this name
        for alias, name in family.tied.items():
            if alias.endswith("decoder.bias") and name in tensors:
                tensors[alias] = tensors[name].clone()
    if not model.config.shared and model.config.source.get("share_encoder_decoder_embeddings", 1):
        side, shared = (f"{prefix}{n}.weight" for n in ("encoder.embed_tokens", "shared"))
        tensors[shared] = tensors[side].clone()
    return tensors


def _write_weights(folder: Path, tensors: dict[str, Tensor], most: int | None) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        total += count
        if most is not None and shards[-1] and size + count > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += count
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {n: file for file, part in zip(names, shards, strict=True) for n in part}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )
    for file, part in zip(names, shards, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~_umask())
        _flush(folder / file)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = sorted(target.iterdir())
    stale = {p for pattern in _WEIGHTS for p in target.glob(pattern)}
    kept = [p for p in old if p not in stale and not (new / p.name).exists()]
    if not any(p.is_dir() and not p.is_symlink() for p in kept) and _exchanged(new, target, kept):
        return
    for path in sorted(new.iterdir(), key=lambda p: p.name in _OURS):
        path.replace(target / path.name)
        stale.discard(target / path.name)
    for path in stale:
        path.unlink()


def _exchanged(new: Path, target: Path, kept: list[Path]) -> bool:
    """The two folders swapped in one step, the files that stay in both; False if that cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        for path in kept:
            if path.is_symlink():
                (new / path.name).symlink_to(os.readlink(path))
            else:
                os.link(path, new / path.name)
    except OSError:
        for path in kept:
            (new / path.name).unlink(missing_ok=True)
        return False
    done = libc.renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0
    if not done:
        for path in kept:
            (new / path.name).unlink(missing_ok=True)
    return done


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
