"""Liger's patch of a model's forward, with the override that `docs/trl.md` gives, taken from that page.

Its fused loss is a Triton kernel: here it runs in Triton's interpreter. Liger's other kernels replace modules inside
the language model, which anchors do not depend on.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import CHATML, byte_level_tokenizer, difference, llava_processor, prompts, tiny_llava, with_labels
from training_toy import arguments

from attanchor_vlm import AttAnchorConfig, attach, expect_anchors, prepare_inputs

liger = pytest.importorskip("liger_kernel.transformers.monkey_patch", reason="liger-kernel is not installed")
PAGE = Path(__file__).parents[3] / "docs" / "trl.md"
INSIDE = {"rope": False, "rms_norm": False, "swiglu": False, "layer_norm": False}
ROUTES = ["embeds", "ids"]


def patched(route: str = "embeds"):
    model = attach(tiny_llava(), AttAnchorConfig(tau=0.1, route=route))
    liger.apply_liger_kernel_to_llava(model=model, **INSIDE)
    assert "forward" in vars(model)
    return model


def test_the_patch_goes_past_the_anchors_and_the_guard_says_so():
    model, batch = patched(), with_labels(prompts([1, 2]))
    del batch["anchor_mask"]
    with pytest.raises(RuntimeError, match=r"past the attached forward.*TRL, Liger.*prepare_inputs"):
        model(**batch)


@pytest.mark.parametrize("route", ROUTES)
def test_prepared_inputs_have_their_anchors(route):
    model, batch = patched(route), with_labels(prompts([1, 2]))
    expected = attach(tiny_llava(), AttAnchorConfig(tau=0.1, route=route))(**batch)
    with torch.no_grad():
        output = model(**prepare_inputs(model, **batch))
    assert model.attanchor_plan.is_anchor.any()
    assert difference(output.logits, expected.logits) < 1e-6
    assert difference(output.loss, expected.loss) < 1e-6
    tokens = model.generate(**prompts([1, 2], "left"), max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] == prompts([1, 2], "left")["input_ids"].shape[1] + 2


def test_the_documented_trainer(tmp_path):
    """Evaluation, which computes logits: no kernel of Liger's is needed."""
    names: dict = {}
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL) if "Liger" in b
    )
    exec(block, names)
    rows = [with_labels(prompts([1], seed=seed)) for seed in range(2)]
    model = patched()
    trainer = names["AnchorLigerTrainer"](
        model,
        arguments(tmp_path, per_device_eval_batch_size=1),
        eval_dataset=rows,
        data_collator=lambda rows: rows[0],
        processing_class=llava_processor(byte_level_tokenizer(), CHATML),
    )
    with expect_anchors(model):
        loss = trainer.evaluate()["eval_loss"]
    plain = attach(tiny_llava(), AttAnchorConfig(tau=0.1))
    expected = sum(float(plain(**row).loss) for row in rows) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
@pytest.mark.parametrize("route", ROUTES)
def test_the_fused_loss_of_a_sequence_with_anchors(route):
    model, batch = patched(route).train(), with_labels(prompts([1, 2]))
    plain = attach(tiny_llava(), AttAnchorConfig(tau=0.1, route=route))
    expected = plain(**batch)
    expected.loss.backward()
    output = model(**prepare_inputs(model, **batch))
    assert output.logits is None, "the loss was not fused"
    output.loss.backward()
    assert abs(float(output.loss - expected.loss)) < 1e-5
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or difference(a.grad, b.grad) < 1e-5, name
