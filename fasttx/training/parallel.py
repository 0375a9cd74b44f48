"""One process, or several under torchrun: DistributedDataParallel or FSDP2 as they are."""

import contextlib
import os

import torch
from torch import Tensor, nn

__all__ = ["Group", "full", "like"]


def full(t: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; otherwise the tensor."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def like(own: Tensor, value: Tensor) -> Tensor:
    """value on own's device, sharded as own is."""
    if hasattr(own, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value.to(own.device)


class Group:
    """rank of world processes, each on `device`; joins torchrun's group where there is one."""

    def __init__(self, device: str, kind: str):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.kind, self.opened = kind, False
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {device}: no CUDA device is visible")
        if device == "cuda" and self.world > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def __enter__(self) -> "Group":
        if self.world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.opened = True
        return self

    def __exit__(self, *_):
        if self.opened:
            torch.distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call; `model` stays the one to save."""
        model.to(self.device)
        if self.world == 1:
            return model
        if self.kind == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool):
        """Gradients are exchanged in the last backward of a step alone."""
        if self.world == 1:
            yield
        elif self.kind == "ddp":
            with contextlib.nullcontext() if last else module.no_sync():
                yield
        else:
            module.set_requires_gradient_sync(last)
            yield

    def sum(self, *values: float) -> list[float]:
        """Of each value over the processes, in float64."""
        if self.world == 1:
            return list(values)
        device = self.device if self.device.type == "cuda" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """For every process to come here."""
        if self.world > 1:
            torch.distributed.barrier()

    def gather(self, value: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every process's tensors, the names with the rank before them."""
        found = [value]
        if self.world > 1:
            found = [None] * self.world
            torch.distributed.all_gather_object(found, value)
        return {f"{rank}.{k}": v for rank, own in enumerate(found) for k, v in own.items()}
