"""Classifiers as reward functions: of whole completions, and of their steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from rl_plugins.nn.sources import check_source
from rl_plugins.rollouts.step_rewards import rewards_per, text_steps


def is_conversational(prompt: Any) -> bool:
    """Tell whether a prompt is a list of messages instead of text."""
    return isinstance(prompt, list) and all(isinstance(message, Mapping) and "role" in message for message in prompt)


class RewardModel:
    """A sequence classifier with one output as a reward function, which scores prompt and completion.

    Args:
        model: The classifier, or where to load it from.
        tokenizer: Its tokenizer; by default that of the same path.
    """

    def __init__(self, model: str | nn.Module, tokenizer: Any = None) -> None:
        path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
        classifier: Any = model
        if isinstance(model, str):
            classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
        self.model, self.tokenizer = classifier.eval(), tokenizer
        self.__name__ = str(path or type(model).__name__).rstrip("/").split("/")[-1]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """Score the pairs of prompt and completion."""
        if is_conversational(prompts[0]):
            chats = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        device = next(self.model.parameters()).device
        inputs = self.tokenizer(text=texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        return self.model(**inputs).logits[:, 0].float().tolist()


class ProcessRewardModel:
    r"""A token classifier as a reward function for the steps of a completion (Lightman et al., arXiv 2305.20050).

    The classifier reads the prompt and the steps, each followed by the separator, and judges a step at the last token
    of its separator. The reward is the probability of the second class, or the logit where there is only one class.
    TRL's former `PRMTrainer` trained classifiers in this format. Both hosts take the object as a reward function.

    Args:
        model: The classifier, or where to load it from.
        tokenizer: Its tokenizer; by default that of the same path.
        separator: Text that ends a step of the completion.
        step_separator: Text that ends a step for the classifier; `separator` by default. TRL's default was `"\n"`.
        batch_size: Completions that are judged at once.

    Example:

    ```python
    trainer = MTPCriticTrainer(model, ProcessRewardModel("my-prm", separator="\n"), config, train_dataset=dataset)
    ```

    Raises:
        ValueError: If the classifier has more than two classes, or the separator is empty.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        separator: str = "\n\n",
        step_separator: str | None = None,
        batch_size: int = 16,
    ) -> None:
        path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        classifier: Any = model
        if isinstance(model, str):
            check_source("model", model)
            classifier = AutoModelForTokenClassification.from_pretrained(model)
        self.model = classifier.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path) if tokenizer is None else tokenizer
        self.separator, self.step_separator = separator, separator if step_separator is None else step_separator
        self.batch_size = batch_size
        if self.model.config.num_labels > 2:
            raise ValueError(
                f"The process reward model has {self.model.config.num_labels} classes. Give one with two, wrong and "
                "right, or with one, whose logit is the reward."
            )
        rewards_per("step", separator=separator)(self)
        self.__name__ = str(path or type(model).__name__).rstrip("/").split("/")[-1]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[list[float]]:
        """Give the rewards of the steps of each completion."""
        rows = [self._tokens(*pair) for pair in zip(prompts, completions, strict=True)]
        return [
            rewards
            for start in range(0, len(rows), self.batch_size)
            for rewards in self._judge(rows[start : start + self.batch_size])
        ]

    def _tokens(self, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        """Tokens of prompt and steps, and the place of each step's last one."""
        if isinstance(completion, str):
            texts, before = [completion], prompt
        else:
            texts = [str(message.get("content") or "") for message in completion if message["role"] == "assistant"]
            before = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        bos = self.tokenizer.bos_token_id
        ids = ([] if bos is None else [bos]) + self._encode(before)
        after, ends = self._encode(self.step_separator), []
        for step in (step for text in texts for step in text_steps(text, self.separator)):
            ids += [*self._encode(step), *after]
            ends.append(len(ids) - 1)
        return ids, ends

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _judge(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        device, width = next(self.model.parameters()).device, max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        scores = logits.softmax(-1)[..., 1] if logits.shape[-1] == 2 else logits[..., 0]
        return [row[ends].tolist() for row, (_, ends) in zip(scores, rows, strict=True)]
