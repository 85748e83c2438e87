"""Tiny random vision-language models with their processors, and prompts with and without images."""

from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
)

from .tiny import CHARACTERS, EOS, PAD, make_tokenizer

SPECIAL = {
    "llava_next": ["<image>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
PLACEHOLDER = {"llava_next": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}


class ImagesOnly(Qwen2_5_VLProcessor):
    """Qwen's processor without the part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def vision_language(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A model of `family` (`llava_next` or `qwen2_5_vl`) and its processor."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True) for t in SPECIAL[family]]})
    ids = dict(zip(SPECIAL[family], tokenizer.convert_tokens_to_ids(SPECIAL[family]), strict=True))
    template = TEMPLATE.replace("IMAGE", PLACEHOLDER[family])
    text = {
        "vocab_size": 2 + len(CHARACTERS) + len(ids),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llava_next":
            vision = CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
                projection_dim=16,
            )
            config = LlavaNextConfig(
                vision_config=vision,
                text_config=Qwen3Config(head_dim=16, **text),
                image_token_index=ids["<image>"],
                image_grid_pinpoints=[[8, 8]],
                vision_feature_layer=-2,
            )
            model: Any = LlavaNextForConditionalGeneration(config)
            images: Any = LlavaNextImageProcessorPil(
                size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=[[8, 8]]
            )
            processor: Any = LlavaNextProcessor(
                images, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=template
            )
            processor.num_additional_image_tokens = 1
        else:
            config = Qwen2_5_VLConfig(
                text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
                vision_config={
                    "depth": 2,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "patch_size": 4,
                    "spatial_merge_size": 2,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
                image_token_id=ids["<|image_pad|>"],
                video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
            )
            model = Qwen2_5_VLForConditionalGeneration(config)
            images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
            processor = ImagesOnly(images, tokenizer, chat_template=template)
    model.generation_config.eos_token_id = EOS
    return model, processor


def picture(i: int) -> Image.Image:
    """Eight pixels squared, different for every `i`."""
    generator = torch.Generator().manual_seed(i)
    return Image.fromarray(torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy())


def looks(kind: str, size: int = 16) -> Dataset:
    """Prompts with an image each (`images`), without (`text`), or both (`mixed`).

    Neither TRL nor transformers takes both in one batch: here they come in pairs, with images, without, without, with.
    So of two ranks with two prompts each, now one has images and then the other.
    """
    rows: list[dict[str, Any]] = []
    for i in range(size):
        row = {"prompt": [{"role": "user", "content": f"{i}+{i}="}], "answer": str(2 * i)}
        has_image = kind == "images" or i // 2 % 4 in (0, 3)
        rows.append(row if kind == "text" else {**row, "images": [picture(i)] if has_image else []})
    return Dataset.from_list(rows)


def lessons(kind: str, size: int = 16) -> Dataset:
    """The prompts of [`looks`] with their answers as completions."""
    answer = {"completion": [[{"role": "assistant", "content": f"{2 * i}"}] for i in range(size)]}
    return looks(kind, size).remove_columns("answer").add_column("completion", answer["completion"])
