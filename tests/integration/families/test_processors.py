"""From a chat and real images to an answer, through the processors of the families that need no torchvision."""

from __future__ import annotations

import builders
import numpy as np
import pytest
import torch
import transformers
from builders import FAMILIES, PATCH, PINPOINTS, SIDE, features, plain
from PIL import Image
from tiny import CHATML, byte_level_tokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from attanchor_vlm import AttAnchorConfig, attach, cli, encode_chat, load_settings, scenes, with_tokens_of

BY_NAME = {family.name: family for family in FAMILIES}
QUESTIONS = ["What is to the left of the red dog?", "Is there a cat in the picture?"]
SQUARE = {"height": SIDE, "width": SIDE}


def tokenizer(**named: str) -> transformers.PreTrainedTokenizerFast:
    """With the markers that some processors ask their tokenizer for by name."""
    plain = byte_level_tokenizer()
    if not named:
        return plain
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        extra_special_tokens=named,
    )


def llava_next():
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML,
    )


def idefics3():
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return transformers.Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=CHATML)


def gemma3():
    named = {"boi_token": "<image>", "image_token": "<s>", "eoi_token": "</s>"}
    images = Gemma3ImageProcessorPil(size=SQUARE)
    return transformers.Gemma3Processor(images, tokenizer(**named), image_seq_length=4, chat_template=CHATML)


def picture(index: int) -> Image.Image:
    height, width = [(20, 30), (33, 18)][index]
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8))


every_processor = pytest.mark.parametrize("make", [llava_next, idefics3, gemma3], ids=lambda make: make.__name__)


def model_for(processor, name: str, monkeypatch):
    monkeypatch.setitem(builders.TEXT, "vocab_size", len(processor.tokenizer))
    model = BY_NAME[name].model()
    model.config.image_token_id = processor.image_token_ids[0]
    return model


@every_processor
def test_a_chat_is_answered_with_anchors_on_the_users_text(make, monkeypatch):
    processor = make()
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in QUESTIONS]
    batch = encode_chat(processor, chats, [[picture(0)], [picture(1)]], add_generation_prompt=True)
    model = model_for(processor, make.__name__, monkeypatch)
    assert int((batch["input_ids"] == processor.image_token_ids[0]).sum()) == len(features(model, batch))

    attach(model, with_tokens_of(AttAnchorConfig(tau=-1), processor))
    output = model.generate(**batch, max_new_tokens=1, do_sample=False)
    plan = model.attanchor_plan
    for row, text in enumerate(QUESTIONS):
        asked = batch["input_ids"][row][batch["anchor_mask"][row]]
        assert processor.tokenizer.decode(asked) == text
        copied = plan.source[row][plan.is_anchor[row]].sort().values
        assert torch.equal(copied, batch["anchor_mask"][row].nonzero()[:, 0])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[:, -1].argmax(-1), output[:, -1])
        # From ids alone, what else is text behind the image takes part as well, but not what asks for the answer.
        model(**plain(batch))
    taken = torch.isfinite(model.attanchor_plan.score)
    assert taken[batch["anchor_mask"]].all()
    for row, text in enumerate(QUESTIONS):
        assert processor.tokenizer.decode(batch["input_ids"][row][taken[row]]).rstrip().endswith(text)


@every_processor
def test_a_checkpoint_on_disk_is_trained_by_the_command_line(make, monkeypatch, tmp_path):
    processor = make()
    for part in (model_for(processor, make.__name__, monkeypatch), processor):
        part.save_pretrained(tmp_path / "model")
    scenes.write_dataset(tmp_path, "train", 4, seed=0)
    options = {
        "--model": tmp_path / "model",
        "--data": tmp_path / "train.json",
        "--images": tmp_path / "images",
        "--output": tmp_path / "run",
        "--preset": "small-llava",
        "--tau": 0.0,
        "--max-steps": 2,
        "--batch-size": 2,
        "--val-fraction": 0,
    }
    assert cli.main(["train", *(str(word) for option in options.items() for word in option)]) == 0
    assert load_settings(tmp_path / "run").tau == 0
