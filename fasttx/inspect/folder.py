"""A model and its tokenizer from a folder: fasttx.models where the family is known there, else
transformers' and patched."""

from pathlib import Path

from torch import nn

__all__ = ["load"]


def load(folder: str | Path, *, patched: bool = False, device=None, dtype=None) -> tuple:
    """(model in eval mode, Tokenizer). patched: transformers' model with fasttx.patch, whatever the
    family.

    Raises ValueError naming the folder and what is missing in it.
    """
    from ..training.tokenizer import Tokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model: {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {folder} has no config.json")
    tokenizer = Tokenizer.load(folder)
    if not patched:
        from ..models import CheckpointError, from_pretrained

        try:
            return from_pretrained(folder, dtype=dtype, device=device), tokenizer
        except CheckpointError as error:
            if "family" not in str(error) and "architectures" not in str(error):
                raise
            refused = error
    try:
        return _patched(folder, device, dtype), tokenizer
    except ImportError:
        raise (
            ValueError("model: transformers is not installed: pip install 'fasttx[huggingface]'")
            if patched
            else refused
        ) from None


def _patched(folder: Path, device, dtype) -> nn.Module:
    import transformers

    from ..integrations.patch import patch

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"model: {folder} names the architecture {name}, unknown to transformers")
    options = {} if dtype is None else {"dtype": dtype}
    model = cls.from_pretrained(folder, local_files_only=True, **options).eval()
    patch(model)
    return model if device is None else model.to(device)
