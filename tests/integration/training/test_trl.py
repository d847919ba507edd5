"""TRL's SFTTrainer with the override that `docs/trl.md` gives, taken from that page."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from tiny import CHATML, byte_level_tokenizer, llava_processor, picture, tiny_llava

from attanchor_vlm import (
    AttAnchorConfig,
    attach,
    encode_chat,
    expect_anchors,
    load_adapter,
    load_settings,
    prepare_inputs,
    save_settings,
)

trl = pytest.importorskip("trl")
PAGE = Path(__file__).parents[3] / "docs" / "trl.md"
LORA = r".*(language_model)\..*\.(q|v)_proj|.*multi_modal_projector\.linear_[12]"


@pytest.fixture(scope="module")
def documented() -> dict:
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1], names)
    return names


def rows() -> list[dict]:
    questions = ["What is to the left of the red dog?", "Is there a cat in the picture?"]
    return [
        {
            "images": [picture(index)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a small blue cube."}]},
            ],
        }
        for index, question in enumerate(questions)
    ]


def make_trainer(trainer_class, collator, processor, directory, **options):
    from datasets import Dataset
    from peft import LoraConfig

    arguments = trl.SFTConfig(
        output_dir=str(directory),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=None,
        prediction_loss_only=True,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    return trainer_class(
        attach(tiny_llava(vocab_size=420), AttAnchorConfig(tau=0.0)),
        args=arguments,
        train_dataset=Dataset.from_list(rows()),
        eval_dataset=Dataset.from_list(rows()),
        processing_class=processor,
        data_collator=collator(processor),
        peft_config=LoraConfig(r=4, target_modules=LORA),
    )


@pytest.fixture
def processor():
    return llava_processor(byte_level_tokenizer(), CHATML)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_documented_trainer_inserts_anchors_and_learns(documented, processor, tmp_path, checkpointing):
    trainer = make_trainer(
        documented["AnchorSFTTrainer"],
        documented["AnchorCollator"],
        processor,
        tmp_path,
        gradient_checkpointing=checkpointing,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    model = trainer.model.get_base_model()
    batch = documented["AnchorCollator"](processor)(rows())
    expected = model(**batch).loss.item()  # fresh LoRA weights change nothing
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    with expect_anchors(model):
        history = trainer.train()
    assert model.attanchor_plan.is_anchor.any()
    assert history.training_loss == pytest.approx(expected, rel=1e-4)
    assert any("multi_modal_projector" in name for name in before)
    after = dict(trainer.model.named_parameters())
    changed = {name for name, values in before.items() if not torch.equal(values, after[name])}
    assert changed == {name for name in before if "lora_B" in name}  # A gets a gradient once B is not zero

    trainer.save_model(str(tmp_path))
    save_settings(model, tmp_path)
    loaded = load_adapter(tiny_llava(vocab_size=420), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-5)


def test_without_the_override_the_guard_fails(documented, processor, tmp_path):
    class Plain(documented["AnchorCollator"]):
        def __call__(self, rows):
            batch = super().__call__(rows)
            del batch["anchor_mask"]  # which the model inside would refuse by its name
            return batch

    trainer = make_trainer(trl.SFTTrainer, Plain, processor, tmp_path)
    with pytest.raises(RuntimeError, match="past the attached forward"):
        trainer.train()


def test_the_collator_marks_the_users_text(documented, processor):
    batch = documented["AnchorCollator"](processor)(rows())
    expected = encode_chat(processor, [row["messages"] for row in rows()], [row["images"] for row in rows()])
    assert batch.keys() == expected.keys() >= {"labels", "anchor_mask", "pixel_values"}
    text = processor.tokenizer.decode(batch["input_ids"][1][batch["anchor_mask"][1]])
    assert text == "Is there a cat in the picture?"


def test_rows_of_text_alone_have_no_mask(documented, processor):
    model, text = attach(tiny_llava(vocab_size=420), AttAnchorConfig(tau=0.0)), rows()[:1]
    text[0]["images"] = []
    text[0]["messages"][0]["content"] = [{"type": "text", "text": "Is there a cat?"}]
    batch = documented["AnchorCollator"](processor)(text)
    assert "anchor_mask" not in batch
    assert torch.isfinite(model(**prepare_inputs(model, **batch)).loss)
    assert "anchor_mask" in documented["AnchorCollator"](processor)([*text, *rows()])


def test_the_documented_script_runs_as_printed(documented, processor, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    here = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": []}  # a machine without a GPU
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, **here))
    names = {**documented, "model": tiny_llava(vocab_size=420), "processor": processor}
    names["dataset"] = Dataset.from_list(rows())
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1], names)
    assert names["trainer"].state.global_step > 0
    assert load_settings(tmp_path / "run").tau == 0.12
    load_adapter(tiny_llava(vocab_size=420), tmp_path / "run")
