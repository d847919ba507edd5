"""Make the small VLM: `attanchor build-small-vlm`. Parts, tokens of the classifier's words, stage 1 on its readings.

The outcome is a checkpoint like any other: `attanchor train`, `eval`, `generate` and `export-lm` take its folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from attanchor_lab.photographs.stamps import find_stamps
from attanchor_lab.small_vlm import parts as sources
from attanchor_lab.small_vlm.config import BuildConfig
from attanchor_lab.small_vlm.parts import CHAT_TEMPLATE, IMAGE, Parts
from attanchor_lab.small_vlm.readings import write_readings
from attanchor_lab.small_vlm.tower import class_words, with_words
from attanchor_vlm.model.load import save_pretrained
from attanchor_vlm.records import check_parent

_MULTIPLE = 64  # rows of the vocabulary, which matrix products like round


def make(config: BuildConfig, say: Callable[[str], None] = print) -> Path:
    """Build the model and save it, whole or not at all, to `config.output`.

    Raises:
        SetupError: a part, or the stamps of stage 1, are not installed; the message has the command that installs them.
        ValueError: `output` exists or cannot be written, or `world` is no folder of `attanchor photographs`.
    """
    if config.output.exists():
        raise ValueError(f"output {config.output} exists; take another folder")
    check_parent(config.output)
    if config.world is not None:
        if not (config.world / "world.json").is_file():
            raise ValueError(
                f"world {config.world} holds no world.json; give a folder that `attanchor photographs` wrote"
            )
        find_stamps(config.stamps)  # that there are none is said before parts are put together
    sources.check_installed()
    parts = sources.read(config.pixels)
    torch.manual_seed(config.seed)
    model, processor = assemble(parts)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.config.image_seq_length} tokens an image")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.output.name}-", dir=config.output.parent) as folder:
        made = Path(folder) / "model"
        save_pretrained(model, processor, made)
        if config.world is not None:
            made = stage1(config, config.world, made, Path(folder), say)
        made.replace(config.output)
    return config.output


def assemble(parts: Parts) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model of `parts`, its projector the identity on the classifier's words, and its processor."""
    tokenizer = parts.tokenizer
    embeddings: Any = parts.language_model.get_input_embeddings()
    words = class_words(parts.names, tokenizer, embeddings.weight)
    tower = with_words(parts.tower, parts.head, words)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text = type(parts.language_model.config)(**parts.language_model.config.to_dict())
    vars(text).pop("quantization_config", None)  # of the file that it was read from
    text.vocab_size = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
    side = tower.config.image_size
    tokens = (side // tower.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    projector = model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    weights = parts.language_model.model.state_dict()
    known = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([known, known.new_zeros(text.vocab_size - len(known), known.shape[1])])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=0,
    )
    return model, processor


def stage1(config: BuildConfig, world: Path, model: Path, folder: Path, say: Callable[[str], None]) -> Path:
    """The model after talks of the tower's readings, each once, in a folder inside `folder`."""
    tower = sources.read_tower(config.pixels)
    scenes = config.steps * config.batch_size
    data = write_readings(world, config.stamps, folder / "readings", scenes, config.pixels, tower, config.seed)
    return taught(config, data, data.parent, model, folder, say)


def taught(
    config: BuildConfig,
    data: Path,
    images: Path,
    model: Path,
    folder: Path,
    say: Callable[[str], None],
    callbacks: Sequence[Any] = (),
) -> Path:
    """`attanchor train` on `data` without anchors, merged into the model it began with, in a folder inside `folder`."""
    from attanchor_vlm import detach, load
    from attanchor_vlm.training import run as training
    from attanchor_vlm.training.config import TrainConfig

    settings: dict[str, Any] = {
        "data": data,
        "images": images,
        "output": folder / "stage1",
        "max_steps": config.steps,
        "turns": "all",
    }
    settings |= {"batch_size": config.batch_size, "lr": config.lr, "align_weight": config.align_weight}
    told = TrainConfig.from_preset(
        "small-vlm", model=str(model), tau=1.0, seed=config.seed, val_fraction=0.0, **settings
    )
    training.run(told, say, progress=False, callbacks=callbacks)
    # Into float32, whatever it was trained in.
    adapted, processor = load(str(model), told.output, dtype=torch.float32)
    whole = adapted.merge_and_unload()
    detach(whole)
    save_pretrained(whole, processor, folder / "trained")
    return folder / "trained"
