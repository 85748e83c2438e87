"""A small policy over four symbols, its tokenizer, and the critic that two benchmarks compare with other methods.

`gradient_quality.py` and `tokens_to_target.py` share this file, which is not a script.
"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SYMBOLS = 4
CRITIC = {"mtp_head_type": "sequential", "value_replay": 1, "head_learning_rate": 1e-3}
"""Options of the critic that learns best, see docs/experiments.md."""


def symbol_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per symbol. The ids of padding and end-of-text are outside of the model's
    vocabulary, since nothing is ever padded."""
    vocabulary = {str(i): i for i in range(SYMBOLS)} | {"<eos>": SYMBOLS, "<pad>": SYMBOLS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def small_policy(longest: int = 32) -> Qwen3ForCausalLM:
    """Make a Qwen3 with random weights, for rows of up to `longest` tokens."""
    config = Qwen3Config(
        vocab_size=SYMBOLS,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config)
