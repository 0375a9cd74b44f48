"""Whole models on fasttx.nn: three topologies, the families as data, Hugging Face folders read and
written. Nothing here imports transformers."""

from .config import CheckpointError, Config
from .families import FAMILIES, HEADS
from .heads import (
    BaseModel,
    CausalLM,
    ConditionalGeneration,
    MaskedLM,
    Output,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from .load import create, from_pretrained
from .save import save_pretrained

__all__ = [
    "FAMILIES",
    "HEADS",
    "BaseModel",
    "CausalLM",
    "CheckpointError",
    "ConditionalGeneration",
    "Config",
    "MaskedLM",
    "Output",
    "QuestionAnswering",
    "SequenceClassification",
    "TokenClassification",
    "create",
    "from_pretrained",
    "save_pretrained",
]
