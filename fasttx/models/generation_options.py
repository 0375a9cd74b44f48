"""What a call of generate asks for: its arguments, behind them the model's defaults, checked."""

import math
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Options", "options_of"]

# Entries of a generation_config.json that change the tokens and that nothing here honours, with the
# values that change nothing.
_UNKNOWN = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "min_p": (0.0,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": (),
    "suppress_tokens": (),
    "typical_p": (1.0,),
}


@dataclass(frozen=True)
class Options:
    """Names and meanings are those of transformers.GenerationConfig; eos_token_id and
    forced_eos_token_id are tuples, empty for none."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()


def options_of(given: dict[str, Any], defaults: dict[str, Any], prompt_length: int) -> Options:
    """given: arguments of generate, None where not given; defaults: the model's
    generation_config. Raises TypeError or ValueError naming the argument."""
    for name, harmless in _UNKNOWN.items():
        value = defaults.get(name)
        if value is not None and value not in harmless and value not in ([], ()):
            raise ValueError(
                f"generation_config of the model sets {name}={value!r}, which generate does not "
                "know: remove it, or use transformers' generate on the patched model"
            )

    def chosen(name):
        return defaults.get(name) if given.get(name) is None else given[name]

    values = {f.name: chosen(f.name) for f in fields(Options)}
    for name in ("eos_token_id", "forced_eos_token_id"):
        values[name] = _token_ids(name, values[name])
    for name in ("pad_token_id", "forced_bos_token_id"):
        values[name] = next(iter(_token_ids(name, values[name], most=1)), None)
    if values["pad_token_id"] is None and values["eos_token_id"]:
        values["pad_token_id"] = values["eos_token_id"][0]
    if values["max_new_tokens"] is None:
        most = defaults.get("max_length")
        values["max_new_tokens"] = 20 if most is None else most - prompt_length
    values = {n: v for n, v in values.items() if v is not None}
    options = Options(**values)
    _check(options)
    return options


def _token_ids(name: str, value, most: int | None = None) -> tuple[int, ...]:
    if value is None:
        return ()
    if hasattr(value, "tolist"):
        value = value.tolist()
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids) or (
        most is not None and len(ids) > most
    ):
        wanted = "a token id" if most == 1 else "a token id or a list of them"
        raise ValueError(f"{name} must be {wanted}, an int of at least 0, got {value!r}")
    return ids


def _whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def _number(name: str, value, least: float, inclusive: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (good and math.isfinite(value) and (value > least or (inclusive and value == least))):
        bound = f"of at least {least:g}" if inclusive else f"above {least:g}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


def _check(options: Options) -> None:
    if options.min_new_tokens is not None:
        _whole("min_new_tokens", options.min_new_tokens, 0)
    for name, least in (
        ("max_new_tokens", 1),
        ("num_beams", 1),
        ("min_length", 0),
        ("no_repeat_ngram_size", 0),
    ):
        _whole(name, getattr(options, name), least)
    _number("repetition_penalty", options.repetition_penalty, 0)
    _number("length_penalty", options.length_penalty, -math.inf)
    if not isinstance(options.do_sample, bool):
        raise TypeError(f"do_sample must be True or False, got {options.do_sample!r}")
    if not (isinstance(options.early_stopping, bool) or options.early_stopping == "never"):
        raise ValueError(
            f"early_stopping must be True, False or 'never', got {options.early_stopping!r}"
        )
    if options.do_sample:
        _number("temperature", options.temperature, 0)
        if options.top_k is not None:
            _whole("top_k", options.top_k, 0)
        if options.top_p is not None:
            _number("top_p", options.top_p, 0, inclusive=True)
            if options.top_p > 1:
                raise ValueError(f"top_p must be in [0, 1], got {options.top_p!r}")
        if options.num_beams > 1:
            raise ValueError(
                f"do_sample must be False with num_beams {options.num_beams}: beams are not sampled"
            )
