"""The model of a config: fasttx's own, or transformers' with fasttx.patch."""

from .objectives import OBJECTIVES
from .text import available_memory
from .tokenizer import Tokenizer, check_tokenizer

__all__ = ["make_model", "model_problems"]

HEADS = {
    "masked_lm": ("masked_lm", "AutoModelForMaskedLM"),
    "causal_lm": ("causal_lm", "AutoModelForCausalLM"),
    "span_corruption": ("conditional_generation", "AutoModelForSeq2SeqLM"),
    "text_infilling": ("conditional_generation", "AutoModelForSeq2SeqLM"),
    "pairs": ("conditional_generation", "AutoModelForSeq2SeqLM"),
}
assert set(HEADS) == {*OBJECTIVES, "pairs"}


class _Asked(dict):
    """A mapping that knows which of its keys were looked at."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def model_problems(
    section, task: str, lengths: dict[str, int], tokenizer, *, packed: bool = False
) -> list[str]:
    """What is wrong with the model section: unknown keys, sizes that cannot be, a family of another
    task, fewer positions than a row has tokens.

    task: an objective's name or "pairs". lengths: of rows, by the key that set them."""
    check = _fasttx_problems if section.library == "fasttx" else _transformers_problems
    size = section.sizes.get("vocab_size", getattr(tokenizer, "vocab_size", 8000))
    sizes = {**section.sizes, "vocab_size": size}
    wrong, limit = check(section, sizes, HEADS[task])
    for name, length in lengths.items():
        if limit is not None and isinstance(length, int) and length > limit:
            wrong.append(f"{name} {length} is more than the model's {limit} positions")
    if section.library == "transformers" and section.family == "bloom" and packed:
        wrong.append(
            "objective.packed must be false for transformers' bloom, which would let packed "
            "documents see each other"
        )
    return wrong


def _fasttx_problems(section, sizes: dict, head: tuple[str, str]) -> tuple[list[str], int | None]:
    from ..models import FAMILIES, CheckpointError
    from ..models.config import Reader
    from ..models.families import PRESETS, configured
    from ..models.heads import architecture

    if section.family not in FAMILIES and section.family not in PRESETS:
        known = ", ".join([*FAMILIES, *PRESETS])
        return [f"model.family must be one of {known}, got {section.family!r}"], None
    kind, preset = PRESETS.get(section.family, (section.family, {}))
    values, aliases = {**preset, **sizes}, FAMILIES[kind].aliases
    asked = _Asked({aliases.get(k, k): v for k, v in values.items()} | values)
    try:
        FAMILIES[kind].config(Reader(asked, "model"))
        config = configured({**values, "model_type": kind}, "model")
        architecture(config, head[0])
    except (CheckpointError, ValueError) as error:
        return [f"model: {str(error).removeprefix('model: ')}"], None
    unknown = [k for k in section.sizes if aliases.get(k, k) not in asked.asked]
    wrong = [f"model.{k} is unknown to {section.family}" for k in unknown]
    width, inner = config.d_model, config.heads * config.head_dim
    layer = 4 * width * inner + (3 if config.gated else 2) * width * config.d_ff
    count = config.layers * layer + config.decoder_layers * (layer + 4 * width * inner)
    count += (config.vocab_size + (config.max_positions or 0)) * width
    return wrong + _memory_problems(count), config.limit()


def _memory_problems(parameters: int) -> list[str]:
    """Weights, gradients and two moments in float32 must fit."""
    available = available_memory()
    if available is None or 16 * parameters <= available:
        return []
    return [
        f"model: about {parameters:.2g} parameters need {16 * parameters / 1e9:,.0f} GB to train, "
        f"and {available / 1e9:,.0f} GB are available"
    ]


def _transformers_problems(section, sizes, head) -> tuple[list[str], int | None]:
    try:
        import transformers
    except ImportError:
        return ["model.library: transformers is not installed"], None
    try:
        plain = transformers.AutoConfig.for_model(section.family)
    except ValueError:
        return [f"model.family: transformers knows no {section.family!r}"], None
    known = set(plain.to_dict()) | set(plain.attribute_map)
    wrong = [f"model.{k} is unknown to {section.family}" for k in sizes if k not in known]
    if wrong:
        return wrong, None
    try:
        config = transformers.AutoConfig.for_model(section.family, **sizes)
        getattr(transformers, head[1])._model_mapping[type(config)]
    except KeyError:
        return [f"model.family {section.family} has no {head[0]} model"], None
    except Exception as error:  # the configs raise many kinds
        return [f"model: {' '.join(str(error).split())}"], None
    limit = getattr(config, "max_position_embeddings", None)
    width, layers = config.hidden_size, config.num_hidden_layers
    wrong = _memory_problems(12 * layers * width**2 + config.vocab_size * width)
    return wrong, limit - 2 if section.family == "roberta" and limit else limit


def make_model(section, task: str, tokenizer: Tokenizer):
    """The model of a task (as model_problems has it), in training mode, with the tokenizer's size
    and special tokens.

    Raises TokenizerMismatch for a folder whose model was trained with another tokenizer.
    """
    head, auto = HEADS[task]
    if section.folder is not None:
        model = _loaded(section, head, auto)
    else:
        values = _tokens(tokenizer, section.family) | section.sizes
        values["vocab_size"] = max(values["vocab_size"], tokenizer.vocab_size)
        if section.library == "fasttx":
            from ..models import create

            model = create(section.family, head, **values)
        else:
            import transformers

            config = transformers.AutoConfig.for_model(section.family, **values)
            model = getattr(transformers, auto).from_config(config)
    check_tokenizer(model, tokenizer)
    if section.library == "transformers" and section.patch:
        from .. import patch

        patch(model)
    return model.train()


def _loaded(section, head: str, auto: str):
    if section.library == "fasttx":
        from ..models import from_pretrained

        return from_pretrained(section.folder, head=head)
    import transformers

    return getattr(transformers, auto).from_pretrained(section.folder, local_files_only=True)


def _tokens(tokenizer: Tokenizer, family: str) -> dict:
    """What a model's config says of its tokenizer; a decoder starts with pad as T5's, or with eos
    as BART's."""
    values = {
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
    }
    if family in ("t5", "bart", "marian", "transformer"):
        values["decoder_start_token_id"] = tokenizer.eos if family == "bart" else tokenizer.pad
    if family == "bart":
        values["forced_eos_token_id"] = tokenizer.eos
    return values
