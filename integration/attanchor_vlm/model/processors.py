"""Processors of checkpoints: also where videos need a torchvision that is not installed, and of old LLaVA files."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.utils import is_torchvision_available


def load_processor(source: str) -> Any:
    """The processor of a folder or Hub id.

    Processors such as those of Qwen-VL, InternVL and Gemma 4 bring a part for videos, which torchvision does; where
    that is not installed, they are loaded without it: images and text are processed as ever (by PIL), a video is
    refused. LLaVA's of early checkpoints, whose files do not say how many tokens an image takes, are told it by the
    model's config; Phi-4's, whose constructor loses the chat template, is given it back.

    Raises:
        ImportError, OSError, ValueError: as `AutoProcessor.from_pretrained` does; also where more than videos needs
            torchvision.
    """
    try:
        processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, ValueError) as error:
        own = None if is_torchvision_available() or "torchvision" not in str(error).lower() else _class_of(source)
        if own is None or "video_processor" not in own.get_attributes():
            raise
        processor = _load_without_videos(own, source)
    if isinstance(processor, ProcessorMixin) and processor.chat_template is None:
        processor.chat_template = processor.get_processor_dict(source)[0].get("chat_template")
    if getattr(processor, "patch_size", 0) is None:  # LLaVA's and LLaVA-NeXT's
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")  # its CLS
    return processor


def _load_without_videos(own: Any, source: str) -> Any:
    try:
        processor: Any = _without_videos(own).from_pretrained(source)
    except ImportError as error:
        if "torchvision" in str(error).lower():
            raise ImportError(f"{own.__name__} needs torchvision for more than videos; install it") from error
        raise
    processor.kept_video_settings = _video_settings(source)
    return processor


def _class_of(source: str) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(source, trust_remote_code=False)), None)


def _video_settings(source: str) -> dict[str, Any] | None:
    """The settings of the part for videos, so that a saved processor is whole where there is a torchvision."""
    from transformers.video_processing_utils import BaseVideoProcessor

    try:
        return BaseVideoProcessor.get_video_processor_dict(source)[0]
    except OSError:
        return None


class _NoVideos(ProcessorMixin):
    """Stands behind a processor class to take the part for videos, None, that it hands up by name."""

    def __init__(self, *args: Any, video_processor: None = None, **options: Any) -> None:
        super().__init__(*args, **options)


def _empty_without_videos(own: Any) -> Any:
    made = _without_videos(own)
    return made.__new__(made)


@functools.cache
def _without_videos(own: Any) -> Any:
    """A processor class less its video processor, under the same name, which `save_pretrained` writes."""

    def get_attributes(cls) -> list[str]:
        return [name for name in own.get_attributes() if name != "video_processor"]

    def to_dict(self) -> dict[str, Any]:
        kept = {"video_processor": self.kept_video_settings} if self.kept_video_settings else {}
        return {**own.to_dict(self), **kept}

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, videos: Any = None, **options: Any) -> Any:
        if videos is not None:
            raise ValueError(f"videos are given, but {own.__name__} was loaded without torchvision; install it")
        return own.prepare_inputs_layout(self, images=images, text=text, videos=None, **options)

    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **options: Any) -> Any:
        args = [*args]
        args.insert(own.get_attributes().index("video_processor"), None)
        settings = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        return super(made, cls).from_args_and_dict(args, settings, **options)

    def video_processor(self) -> SimpleNamespace:
        # SmolVLM's chat templates are rendered with the number of frames at hand, videos or not.
        return SimpleNamespace(**{"num_frames": None, "fps": None, **(self.kept_video_settings or {})})

    body = {
        "__doc__": own.__doc__,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "kept_video_settings": None,
        "get_attributes": classmethod(get_attributes),
        "from_args_and_dict": classmethod(from_args_and_dict),
        "video_processor": property(video_processor),
        "to_dict": to_dict,
        "prepare_inputs_layout": prepare_inputs_layout,
        "__reduce__": lambda self: (_empty_without_videos, (own,), self.__dict__),  # no import finds a class made here
    }
    made: Any = type(own.__name__, (own, _NoVideos), body)
    return made
