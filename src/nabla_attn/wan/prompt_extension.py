"""Prompt extension by a local instruct model through transformers."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_attn.errors import first_line

METHODS = ("local_qwen", "dashscope")
LANGUAGES = {"zh": "Chinese", "en": "English"}
INSTRUCTION = (
    "You write prompts for a text-to-video model. Rewrite the user's prompt in {language} as one "
    "paragraph of 80 to 100 words. Keep every subject, action and number it names, and quoted text "
    "as it is. Add what is missing: how things look, the surroundings, light, camera and style. "
    "Answer with the prompt alone."
)
MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class PromptExtension:
    """How a prompt is rewritten before the run.

    Attributes:
        method: `"local_qwen"`; the reference's `"dashscope"` is refused.
        model: The directory of an instruct model.
        language: `"zh"` or `"en"`.
        is_on: Whether the prompt is rewritten at all.
    """

    method: str = METHODS[0]
    model: str | None = None
    language: str = "zh"
    is_on: bool = True

    def directory(self) -> Path:
        """The directory of the instruct model.

        Raises:
            ValueError: The method or language is unknown, the method is the remote service, or
                there is no such directory.
        """
        if self.method not in METHODS:
            raise ValueError(
                f"unknown prompt_extend_method {self.method!r}. Known: {', '.join(METHODS)}."
            )
        if self.method == "dashscope":
            raise ValueError(
                "dashscope sends the prompt to a remote service and needs an account there; "
                "nothing here touches the network. Use --prompt_extend_method local_qwen with a "
                "model on disk."
            )
        if self.language not in LANGUAGES:
            raise ValueError(
                f"unknown prompt_extend_target_lang {self.language!r}. Known: "
                f"{', '.join(LANGUAGES)}."
            )
        if self.model is None or not Path(self.model).is_dir():
            raise ValueError(
                f"prompt extension needs an instruct model on disk, got {self.model!r}. Pass "
                "--prompt_extend_model DIRECTORY, such as a Qwen2.5-Instruct of transformers."
            )
        return Path(self.model)

    def extend(self, prompt: str, seed: int, device: Any) -> str:
        """The prompt at more length, or as it is where the extension is off.

        Args:
            prompt: The user's words; images are not looked at.
            seed: Seed of the sampling.
            device: Device that the model runs on.

        Raises:
            ValueError: As `directory`; or the model cannot be read, asks to run code, or answers
                nothing.
        """
        if not self.is_on:
            if self.model is not None or self.method != METHODS[0]:
                warnings.warn(
                    "--prompt_extend_model and --prompt_extend_method are ignored without "
                    "--use_prompt_extend.",
                    stacklevel=2,
                )
            return prompt
        return _answer(
            self.directory(),
            INSTRUCTION.format(language=LANGUAGES[self.language]),
            prompt,
            seed,
            device,
        )


def _answer(directory: Path, instruction: str, prompt: str, seed: int, device: Any) -> str:
    """What the instruct model of a directory says to a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    messages = [
        {"role": "system", "content": instruction},
        {"role": "user", "content": prompt},
    ]
    local: Any = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **local)
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", use_safetensors=True, **local
        ).to(device)
        if tokenizer.chat_template is None:
            raise ValueError("its tokenizer has no chat template")
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:
        # Models meet damaged files with every kind of error.
        raise ValueError(
            f"{directory} is no instruct model that transformers reads: {first_line(error)}. Pass "
            "another --prompt_extend_model."
        ) from error
    inputs = encoded.to(device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    answer = str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()
    if not answer:
        raise ValueError(f"{directory} answered nothing. Run without --use_prompt_extend.")
    return answer
