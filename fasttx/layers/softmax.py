"""Softmax and its logarithm, as torch.nn has them."""

from torch import Tensor, nn

from ..ops.softmax import log_softmax, softmax
from ._fit import fit

__all__ = ["LogSoftmax", "Softmax"]


class Softmax(nn.Softmax):
    """torch.nn.Softmax on fasttx.softmax. Constructor and errors are torch's; a row that is -inf
    everywhere gives 0, where torch gives NaN."""

    def forward(self, input: Tensor) -> Tensor:
        if not _fits(input, self.dim):
            return super().forward(input)
        return softmax(input, dim=self.dim)


class LogSoftmax(nn.LogSoftmax):
    """torch.nn.LogSoftmax on fasttx.log_softmax; as Softmax in everything else, -inf for 0."""

    def forward(self, input: Tensor) -> Tensor:
        if not _fits(input, self.dim):
            return super().forward(input)
        return log_softmax(input, dim=self.dim)


def _fits(x, dim) -> bool:
    return fit(x) and type(dim) is int and x.dim() > 0 and -x.dim() <= dim < x.dim()
