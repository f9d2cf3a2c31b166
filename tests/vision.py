"""Folders of tiny image-text models with random weights, with tokenizers and processors."""

from __future__ import annotations

import base64
import copy
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.engine.conftest import SHAPE
from tests.fakes import build_tokenizer

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>")
TOKENIZER = build_tokenizer(*SPECIAL)
IDS = {text: TOKENIZER.convert_tokens_to_ids(text) for text in SPECIAL}
TEXT = {**SHAPE, "vocab_size": 272, "max_position_embeddings": 512}
PATCH = 14
# A token of text.
SEPARATOR = 45

# As LLaVA's are: it writes a content only if it is a list, and its images first.
LIST_TEMPLATE = """\
{%- for message in messages %}{{ message.role | upper }}: {% for part in message.content \
| selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{%- for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}\
{%- endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# As Qwen's are: it takes both, and writes each part where it is.
CHATML_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}\
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def _qwen_text(**more: Any) -> dict[str, Any]:
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return {**TEXT, "rope_parameters": sections, **more}


QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llava": LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=2 * PATCH,
            patch_size=PATCH,
            projection_dim=32,
        ),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IDS["<image>"],
        vision_feature_layer=-1,
        image_seq_length=4,
    ),
    "qwen2_vl": Qwen2VLConfig(
        text_config=_qwen_text(),
        vision_config={**VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        **QWEN_IDS,
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=_qwen_text(),
        vision_config={
            **VISION,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 2 * 2 * PATCH,
        },
        **QWEN_IDS,
    ),
}
TEMPLATES = {"llava": LIST_TEMPLATE}


def build_vision_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():  # else every logit is a near-tie, and no picture changes any
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = None
    return model.eval()


def write_vision_model(folder: Path, kind: str) -> Path:
    """In the format of the hub."""
    build_vision_model(kind).save_pretrained(folder)
    tokenizer = copy.deepcopy(TOKENIZER)
    template = TEMPLATES.get(kind, CHATML_TEMPLATE)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if kind == "llava":
        size = {"height": 2 * PATCH, "width": 2 * PATCH}
        images = CLIPImageProcessorPil(size={"shortest_edge": 2 * PATCH}, crop_size=size)
        LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        ).save_pretrained(folder)
    else:
        area = (2 * PATCH) ** 2
        Qwen2VLImageProcessorPil(min_pixels=area, max_pixels=12 * area).save_pretrained(folder)
    return folder


def draw(number: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Pictures that differ."""
    ramp = Image.linear_gradient("L").rotate(90 * number).resize(size)
    bands = [ramp.point(lambda value, shift=shift: (value + shift) % 256) for shift in (0, 60, 140)]
    return Image.merge("RGB", bands[number % 3 :] + bands[: number % 3])


def to_uri(picture: Image.Image, format: str = "PNG", **options: Any) -> str:
    target = io.BytesIO()
    picture.save(target, format, **options)
    data = base64.b64encode(target.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{data}"


def image_part(picture: Image.Image, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": to_uri(picture), **more}}


def png_of(width: int, height: int) -> bytes:
    """A PNG that says so of itself, and holds nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def rewrite(path: Path, **changes: Any) -> None:
    """Of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
