"""What the text encoders of a pipeline read of a request's texts; whoever is cut short is told."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nabla_attn.generation.request import GenerationRequest, ModelDefaults

ENCODERS = {
    "tokenizer": "the text encoder",
    "tokenizer_2": "the second text encoder",
    "tokenizer_3": "the third text encoder",
}

MAX_LISTED = 100
"""Words of a vocabulary up to which a warning names all of them."""

Cut = dict[str, dict[str, dict[str, int]]]
"""Text of the request -> tokenizer -> its "tokens", and how many of them are "read"."""


@contextmanager
def watch_texts(pipeline: Any, request: GenerationRequest) -> Iterator[Cut]:
    """Watch the pipeline's tokenizers for the time of a block, and warn of each text they cut.

    Args:
        pipeline: A diffusers pipeline.
        request: The request whose texts are read in the block.

    Yields:
        The texts that were cut; it fills in the block.
    """
    cut: Cut = {}

    def note(place: str, text: str, excess: int, count: Callable[[str], int]) -> None:
        name = _name_of(text, request)
        found = cut.setdefault(name, {})
        if place in found:
            return
        # A template and special tokens take their room from the text.
        tokens = count(getattr(request, name))
        found[place] = {"tokens": tokens, "read": max(0, tokens - excess)}
        warnings.warn(
            f"the {name.replace('_', ' ')} has {tokens} tokens and {ENCODERS[place]} reads "
            f"{found[place]['read']}: the rest is ignored.",
            stacklevel=2,
        )

    with ExitStack() as stack:
        for place in ENCODERS:
            found = getattr(pipeline, place, None)
            # Some pipelines have a processor in its place, which holds the tokenizer.
            tokenizer = getattr(found, "tokenizer", found)
            if tokenizer is not None:
                stack.enter_context(_watched(tokenizer, partial(note, place)))
        yield cut


def warn_of_unread(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Warn of a negative prompt that the pipeline's call will not read.

    Args:
        pipeline: A diffusers pipeline.
        call: The arguments of its call; those left out have the pipeline's defaults.
    """
    if not call.get("negative_prompt"):
        return
    known = inspect.signature(pipeline.__call__).parameters
    values = {name: entry.default for name, entry in known.items()} | dict(call)
    # Where it exists, guidance_scale is an input of the model, and this one needs both texts.
    true_scale = values.get("true_cfg_scale")
    if true_scale is not None:
        if true_scale <= 1:
            warnings.warn(
                f"the negative prompt is ignored: {type(pipeline).__name__} has guidance built in, "
                "which takes none. In your own code, a true_cfg_scale above 1 reads it.",
                stacklevel=3,
            )
        return
    guider = getattr(pipeline, "guider", None)
    scale = values.get("guidance_scale", getattr(guider, "guidance_scale", None))
    if scale is not None and max(scale, values.get("audio_guidance_scale") or 0) <= 1:
        warnings.warn(
            f"the negative prompt is ignored: guidance {scale:g} is none. Pass --guidance above 1.",
            stacklevel=3,
        )


def warn_of_unknown_words(pipeline: Any, name: str, text: str) -> None:
    """Warn of words that the tokenizer does not know, and say what the model does know.

    Of a small vocabulary all words are named, and the examples that the model's directory gives.

    Args:
        pipeline: A diffusers pipeline.
        name: The name of the text in the message.
        text: The text.
    """
    tokenizer = getattr(pipeline, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not text or not hasattr(tokenizer, "vocab_size"):
        return
    assert tokenizer is not None
    words = [
        word
        for word in dict.fromkeys(text.split())
        if unknown in tokenizer(word, add_special_tokens=False).input_ids
    ]
    if words:
        warnings.warn(
            f"the model does not know these words of the {name}: {', '.join(words[:8])}."
            + _what_it_knows(tokenizer)
            + _examples(pipeline),
            stacklevel=3,
        )


def _what_it_knows(tokenizer: Any) -> str:
    special = set(tokenizer.all_special_tokens)
    words = [word for word in tokenizer.get_vocab() if word not in special]
    return f" It knows {', '.join(sorted(words))}." if len(words) <= MAX_LISTED else ""


def _examples(pipeline: Any) -> str:
    directory = Path(str(pipeline.config.get("_name_or_path", "")))
    found = ModelDefaults.load(directory).examples
    return f" Try {'; '.join(f'{text!r}' for text in found)}." if found else ""


@contextmanager
def _watched(
    tokenizer: Any, note: Callable[[str, int, Callable[[str], int]], None]
) -> Iterator[None]:
    """Give a tokenizer a class that tells of every text it cuts, for the time of a block."""
    own = type(tokenizer)

    def count(text: str, **options: Any) -> int:
        found = own.__call__(tokenizer, text, truncation=False, verbose=False, **options)
        return len(found.input_ids)

    def call(self: Any, text: Any = None, *others: Any, **options: Any) -> Any:
        if options.get("truncation"):
            limit = options.get("max_length") or self.model_max_length
            special = options.get("add_special_tokens", True)
            for each in [text] if isinstance(text, str) else text or []:
                if isinstance(each, str):
                    excess = count(each, add_special_tokens=special) - limit
                    if excess > 0:
                        note(each, excess, count)
        return own.__call__(self, text, *others, **options)

    try:
        tokenizer.__class__ = type(own.__name__, (own,), {"__call__": call})
    except TypeError:
        # A plain function in its place has no class that could be changed.
        yield
        return
    try:
        yield
    finally:
        tokenizer.__class__ = own


def _name_of(text: str, request: GenerationRequest) -> str:
    """Which of the request's texts this one holds, whatever a template put around it."""
    words = " ".join(text.split())
    own = {name: " ".join(getattr(request, name).split()) for name in ("prompt", "negative_prompt")}
    held = [name for name, each in own.items() if each and each in words]
    return max(held, key=lambda name: len(own[name]), default="prompt")
