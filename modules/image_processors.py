"""Files of an image-text model → its ImageReader, if it has what one needs.

transformers' own loading wants the part for videos too, which only exists with torchvision; images
go without either.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig

# From there and not from above: some versions hide it behind torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from modules.errors import MissingPackageError
from modules.image_reader import ImageReader
from modules.model_kinds import PROCESSOR_FILES
from modules.optional_packages import import_package

logger = logging.getLogger(__name__)

# What a processor's files that are damaged, or not meant for this program, make transformers raise.
_FAULTS = (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError)


def can_read_images(config: PretrainedConfig) -> bool:
    """Whether it is a kind of model that writes text and sees images."""
    known: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return not config.is_encoder_decoder and type(config) in known


def load_image_reader(folder: Path, options: Mapping[str, Any]) -> ImageReader | None:
    """With a warning, None where the files are there and cannot be used; such a model reads text.

    `options` are from_pretrained's.
    """
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    config = AutoConfig.from_pretrained(folder, **options)
    if not can_read_images(config):
        return None
    try:
        import_package("PIL.Image", "Images", "pillow")
        return ImageReader(_load_processor(folder, config, options))
    except (MissingPackageError, *_FAULTS) as error:
        logger.warning("%s reads no images: %s", folder.name, _explain(error))
        return None


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "orchvision" in text:
        return "its kind needs a package for that which is missing: pip install torchvision"
    return text or type(error).__name__


def _load_processor(folder: Path, config: PretrainedConfig, options: Mapping[str, Any]) -> Any:
    own: Any = PROCESSOR_MAPPING.get(type(config), None)
    if own is None or "video_processor" not in own.get_attributes():
        return AutoProcessor.from_pretrained(folder, **options)
    parts: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    loaded = [
        parts[name].from_pretrained(folder, **options) if name in parts else None
        for name in own.get_attributes()
    ]
    written, _ = own.get_processor_dict(folder, **options)
    return _without_videos(own).from_args_and_dict(loaded, written)


def _without_videos(processor: Any) -> Any:
    class ImageProcessor(processor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if argument is None:
                return NoneType
            return super().check_argument_for_proper_class(name, argument)

    return ImageProcessor
