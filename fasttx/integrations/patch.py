"""`patch(model)`: a model of transformers or torch.nn runs fasttx; `unpatch(model)` undoes it."""

from torch import nn

from . import hf, torch_nn
from .report import PatchEntry, PatchReport


def patch(
    model: nn.Module, *, strict: bool = False, logits: bool = False, unpad: bool = False
) -> PatchReport:
    """Make a Hugging Face or torch.nn model run fasttx's kernels, in inference and training.

    model: a transformers model or any module with some in it (BERT and RoBERTa with the families
    that share their attention, GPT-2, BART, T5, BLOOM and Llama: hf_families.py), or a module with
    torch.nn's MultiheadAttention, Transformer, encoder, decoder or their layers (torch_nn.py).
    Patching again changes nothing. With strict=True a model with a module that cannot be replaced,
    or with no attention at all, is left alone and NotImplementedError lists the reasons. A language
    model of transformers that is given labels in training returns the loss and no logits (None),
    which saves their memory and time; with logits=True, and in evaluation, it returns both.

    With unpad=True the encoders of BERT and its families, T5 and BART take padding out of a batch
    before their first layer and put it back after the last: time follows the real tokens. Hidden
    states of padding are 0 then, where transformers has values that no mask should let through;
    what reads them (the first token under left padding, a mean over all places) gets another
    answer. A batch stays padded under torch.compile and where hooks, output_hidden_states or
    output_attentions would see the difference.

    Returns the report of what was replaced, what was not, and why. Raises TypeError for anything
    that is not a module, ValueError for unpad=True where there is no such encoder.

    >>> fasttx.patch(model)
    BertModel: 6 of 6 modules run fasttx
      encoder.layer.*.attention.self  6 x BertSelfAttention  replaced
    """
    _check(model, "patch")
    found = hf.plan(model, logits, unpad)
    taken = {f.module for f in found}
    models = [module for module in model.modules() if hf.is_model(module)]
    found += [f for f in torch_nn.plan(model, models) if f.module not in taken]
    places = {module: i for i, module in enumerate(model.modules())}
    found.sort(key=lambda f: places[f.module])
    report = PatchReport(
        type(model).__name__,
        tuple(PatchEntry(f.name, type(f.module).__name__, f.reason) for f in found),
    )
    if strict and (report.skipped or not any(f.attention for f in found)):
        why = report if report.skipped else f"{report.model}: no attention module was found"
        raise NotImplementedError(f"fasttx.patch(strict=True) changed nothing\n{why}")
    for f in found:
        if f.reason is None:
            f.replace()
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module gets its class and every config the attention implementation it
    had before.

    A model that is not patched stays as it is, an implementation chosen after patching is kept.
    Raises TypeError as `patch` does.
    """
    _check(model, "unpatch")
    hf.restore(model)
    torch_nn.restore(model)


def _check(model, caller: str) -> None:
    if isinstance(model, type):
        raise TypeError(f"fasttx.{caller}: model must be an instance, got the class {model}")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fasttx.{caller}: model must be a torch.nn.Module, got {type(model).__name__}"
        )
