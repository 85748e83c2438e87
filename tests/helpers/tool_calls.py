"""Tools and environments of TRL with a scripted policy: only the decoding of a turn is replaced."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from .tiny import ON_CPU, make_tiny_model

END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", END, "<|im_start|>"]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and Qwen3's chat template, for which TRL knows how to read tool calls."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=END,
        additional_special_tokens=SPECIAL[2:],
        padding_side="left",
    )
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return made


def chat_model() -> Qwen3ForCausalLM:
    """A tiny model for the tokenizer."""
    return make_tiny_model(vocab_size=len(SPECIAL) + 256, max_position_embeddings=4096, num_hidden_layers=1)


def call(name: str, **arguments: Any) -> str:
    """A tool call as Qwen3 writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Script:
    """A policy that says what it is told.

    Args:
        rows: For each row of a batch its turns; a turn is a list of tool calls and text. A row whose turns are used
            up says `done`.

    Attributes:
        asked: Rows that were asked for a turn, by call.
    """

    def __init__(self, *rows: Sequence[str]) -> None:
        self.rows, self.tokenizer = rows, chat_tokenizer()
        self.asked: list[list[int]] = []
        self._histories: list[list[int]] = []
        self._turns: list[int] = []
        self.logprobs = False

    def ids(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.tokenizer(text=text, add_special_tokens=False)["input_ids"]

    def _says(self, row: int) -> list[int]:
        turns = self.rows[row % len(self.rows)]
        text = turns[self._turns[row]] if self._turns[row] < len(turns) else "done"
        self._turns[row] += 1
        return self.ids(text if text.endswith("~") else text + END)  # a tilde: cut before the end

    def _of(self, prompts: list[list[int]]) -> list[int]:
        """Rows of prompts that go on where these have stopped."""
        free, found = list(range(len(self._histories))), []
        for prompt in prompts:
            row = next(row for row in free if prompt[: len(self._histories[row])] == self._histories[row])
            free.remove(row)
            found.append(row)
        return found

    def generate(self, host: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Stand in for TRL's `_generate_single_turn`."""
        if "has_tool_images" not in kwargs:  # the first turn of a batch
            self._histories, self._turns = list(prompt_ids), [0] * len(prompt_ids)
            rows = list(range(len(prompt_ids)))
        else:
            rows = self._of(prompt_ids)
        self.asked.append(rows)
        made = [self._says(row) for row in rows]
        for row, prompt, ids in zip(rows, prompt_ids, made, strict=True):
            self._histories[row] = prompt + ids
        return made, [[-1.0] * len(ids) for ids in made] if self.logprobs else None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Script":
        """Decode in every trainer of TRL from now on."""
        monkeypatch.setattr(
            trl.GRPOTrainer,
            "_generate_single_turn",
            lambda host, *args, **kwargs: self.generate(host, *args, **kwargs),
        )
        return self


def prompts(size: int, **columns: list[Any]) -> Dataset:
    """Conversations that differ in their number."""
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"No. {i}"}] for i in range(size)], **columns})


def make_trainer(
    trainer_class: Any, folder: Path, rows: int = 2, options: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    """A trainer of TRL or ours on conversations, with a config of its own kind."""
    names = {"GRPOTrainer": trl.GRPOConfig}
    config_class = names.get(trainer_class.__name__) or trainer_class.config_class
    arguments.setdefault("train_dataset", prompts(rows))
    return trainer_class(
        chat_model(),
        arguments.pop("reward_funcs", None),
        config_class(
            **{
                "output_dir": str(folder),
                **ON_CPU,
                "per_device_train_batch_size": rows,
                "num_generations": rows,
                "max_completion_length": 512,
                "max_steps": 1,
                "logging_steps": 1,
                "learning_rate": 1e-3,
                "chat_template_kwargs": {"enable_thinking": False},
                **(options or {}),
            }
        ),
        processing_class=chat_tokenizer(),
        **arguments,
    )


def play(trainer: Any, rows: Sequence[dict[str, Any]] | None = None) -> Any:
    """One scored batch of the trainer's first rows, or of others, without training."""
    trainer.model.train()
    size = trainer.args.per_device_train_batch_size
    data = trainer.train_dataset if rows is None else rows
    given = [dict(data[i % len(data)]) for i in range(size)]
    return trainer._generate_and_score_completions(given)


def paid(batch: Any) -> list[dict[int, float]]:
    """Reward by token of each row of `last_rollout`, where something is paid."""
    return [
        {t: float(reward) for t, reward in enumerate(row) if where[t]}
        for row, where in zip(batch["rewards"], batch["paid"], strict=True)
    ]


def turn_ends(batch: Any) -> list[list[int]]:
    """Last token of each turn of the policy, by the masks of TRL."""
    mask = batch["completion_mask"] * batch.get("tool_mask", torch.ones_like(batch["completion_mask"]))
    rows = torch.nn.functional.pad(mask, (0, 1))
    return [[t for t in range(len(row) - 1) if row[t] and not row[t + 1]] for row in rows.tolist()]
