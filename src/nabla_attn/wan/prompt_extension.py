"""Prompt extension by a local instruct model through transformers."""

from pathlib import Path
from typing import Any

METHODS = ("local_qwen", "dashscope")
LANGUAGES = {"zh": "Chinese", "en": "English"}
INSTRUCTION = (
    "You write prompts for a text-to-video model. Rewrite the user's prompt in {language} as one "
    "paragraph of 80 to 100 words. Keep every subject, action and number it names, and quoted text "
    "as it is. Add what is missing: how things look, the surroundings, light, camera and style. "
    "Answer with the prompt alone."
)
MAX_NEW_TOKENS = 512


def check_method(method: str, language: str, model: str | None) -> Path:
    """The directory of the instruct model.

    Raises:
        ValueError: an unknown method or language, the remote service, or no such directory.
    """
    if method not in METHODS:
        raise ValueError(f"unknown prompt_extend_method {method!r}. Known: {', '.join(METHODS)}.")
    if method == "dashscope":
        raise ValueError(
            "dashscope sends the prompt to a remote service and needs an account there; nothing "
            "here touches the network. Use --prompt_extend_method local_qwen with a model on disk."
        )
    if language not in LANGUAGES:
        raise ValueError(
            f"unknown prompt_extend_target_lang {language!r}. Known: {', '.join(LANGUAGES)}."
        )
    if model is None or not Path(model).is_dir():
        raise ValueError(
            f"prompt extension needs an instruct model on disk, got {model!r}. Pass "
            "--prompt_extend_model DIRECTORY, such as a Qwen2.5-Instruct in transformers format."
        )
    return Path(model)


def extend_prompt(prompt: str, directory: Path, language: str, seed: int, device: Any) -> str:
    """Rewrite ``prompt`` at more length; images are not looked at.

    Args:
        prompt: the user's words.
        directory: an instruct model in transformers format, with a chat template.
        language: ``"zh"`` or ``"en"``.
        seed: of the sampling.
        device: where the model runs.

    Raises:
        ValueError: the model cannot be read, or answers nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype="auto", use_safetensors=True
        ).to(device)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory} is no instruct model that transformers reads: {error}"
        ) from error
    messages = [
        {"role": "system", "content": INSTRUCTION.format(language=LANGUAGES[language])},
        {"role": "user", "content": prompt},
    ]
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = encoded.to(device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    answer = str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()
    if not answer:
        raise ValueError(f"{directory} answered nothing. Run without --use_prompt_extend.")
    return answer
