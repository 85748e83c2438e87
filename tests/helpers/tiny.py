"""A tiny random Qwen3, a character tokenizer, arithmetic prompts, a deterministic reward."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl_plugins.signals.critics import CriticSignal

CHARACTERS = "0123456789+-= "
PAD, EOS = 0, 1
ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Options of every trainer of transformers and TRL for a quick and quiet run in float32."""
# Where and in what precision tests/test_device.py runs; recipes/benchmarks/gpu_check.sh sets both.
DEVICE = os.environ.get("RL_PLUGINS_TEST_DEVICE", "cpu")
DTYPE = getattr(torch, os.environ.get("RL_PLUGINS_TEST_DTYPE", "bfloat16"))


def make_tiny_model(seed: int = 0, **overrides: Any) -> Qwen3ForCausalLM:
    """A random Qwen3 with 2 layers and hidden size 32; `overrides` go to its config. Leaves the global RNG alone."""
    config = Qwen3Config(
        **{
            "vocab_size": 2 + len(CHARACTERS),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": None,
            "tie_word_embeddings": True,
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of `CHARACTERS`; pads on the left."""
    vocab = {"<pad>": PAD, "<eos>": EOS} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_dataset(size: int = 64) -> Dataset:
    """Prompts `0+0=`, `1+1=`, ... of different lengths, with the right `answer`."""
    return Dataset.from_dict(
        {"prompt": [f"{i}+{i}=" for i in range(size)], "answer": [str(2 * i) for i in range(size)]}
    )


def digit_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of the completion's characters that are odd digits: deterministic, dense, in [0, 1]."""
    return [sum(c in "13579" for c in text) / max(len(text), 1) for text in completions]


def make_critic_args(output_dir: Path | str, **overrides: Any) -> Any:
    """An `MTPCriticConfig` for a quick run on CPU."""
    from rl_plugins.trl import MTPCriticConfig

    return MTPCriticConfig(
        **{
            "output_dir": str(output_dir),
            **ON_CPU,
            "num_mtp_heads": 2,
            "per_device_train_batch_size": 8,
            "max_completion_length": 6,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            **overrides,
        }
    )


def change_values(host: Any, **changes: Any) -> None:
    """Have the critic of a trainer or module go on with other value options."""
    host.critic.values = dataclasses.replace(host.critic.values, **changes)
    host.signal = CriticSignal(host.critic)


def record_passes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have records fail that were not fed by a forward pass over whole completions."""
    from rl_plugins.rollouts import ValueRecord, WholeRows

    fed: list[Any] = []
    start, finish = WholeRows.__init__, ValueRecord.finish

    def note(self: WholeRows, record: ValueRecord, num_tokens: int) -> None:
        fed.append(record)
        start(self, record, num_tokens)

    def fail(self: ValueRecord, num_tokens: int) -> Any:
        return finish(self, num_tokens) if any(record is self for record in fed) else None

    monkeypatch.setattr(WholeRows, "__init__", note)
    monkeypatch.setattr(ValueRecord, "finish", fail)
