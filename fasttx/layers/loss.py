"""Cross-entropy from logits, as torch.nn has it."""

import torch
from torch import Tensor, nn

from ..ops.cross_entropy import cross_entropy
from ._fit import fit

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fasttx.cross_entropy: the mean (or sum, or each) of
    -log softmax(input)_target, classes in dimension 1 of input, or 0 of a vector.

    Constructor, buffers, errors and the result's dtype are torch's. Targets that are probabilities
    run on torch.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not self._fits(input, target):
            return super().forward(input, target)
        try:
            loss = cross_entropy(
                input.movedim(1, -1) if input.dim() > 1 else input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        except (TypeError, ValueError):  # a target or an option out of range, in torch's words
            return super().forward(input, target)
        return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)

    def _fits(self, input, target) -> bool:
        if not fit(input, self.weight) or not isinstance(target, Tensor):
            return False
        if target.dtype not in (torch.int64, torch.uint8) or input.numel() == 0:
            return False
        return (
            target.shape == input.shape[:1] + input.shape[2:]
            if input.dim() > 1
            else (input.dim() == 1 and target.dim() == 0)
        )
