"""What a run's settings mean and refuse, and what they come to on this machine; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_toy import settings

from attanchor_vlm.errors import SetupError
from attanchor_vlm.model import load as loading
from attanchor_vlm.training.config import SCHEDULERS, Method
from attanchor_vlm.training.lora import choose_optimizer

STREAM = {"stream": True, "val_data": None}


def test_presets_are_the_papers():
    tiny, large, qwen = (Method.from_preset(name) for name in ("tinyllava-1b", "llava-7b", "qwen2.5-vl-3b"))
    table = {
        "dtype": ("float16", "float16", "bfloat16"),
        "tau": (0.12, 0.12, 0.08),
        "lora_rank": (32, 8, 32),
        "lora_alpha": (64, 16, 64),
        "lora_dropout": (0.05, 0.05, 0.05),
        "batch_size": (4, 8, 8),
        "accumulation": (4, 4, 4),
        "lr": (1e-4, 2e-4, 1e-4),
        "scheduler": ("cosine",) * 3,
        "warmup": (0.03, 0.03, 0.1),
        "weight_decay": (0.003, 0.0, 0.03),
        "optimizer": ("adamw_torch", "paged_adamw_8bit", "paged_adamw_8bit"),
        "epochs": (4, 2, 2),
        "patience": (10_000, 5_000, 4_500),
    }
    for name, values in table.items():
        assert tuple(getattr(preset, name) for preset in (tiny, large, qwen)) == values, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; it should be greater than 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; it should be at least 0 and less than 1"),
        ({"turns": "some"}, "turns is 'some'; it should be one of 'each', 'all'"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1; it should be at least 0"),
        (
            {"scheduler": "cosine_with_min_lr"},
            "scheduler is 'cosine_with_min_lr'; it should be one of 'linear', 'cosine'",
        ),
        ({"scheduler": "reduce_lr_on_plateau", "val_data": None, "val_fraction": 0}, "but there is no validation"),
        ({"val_fraction": 0.5}, "val_fraction is 0.5 with val_data"),
        ({"shuffle_buffer": 5}, "shuffle_buffer is 5, but there is no stream"),
        ({"calibration_samples": 4}, "calibration_samples is 4, but there is no fraction"),
        # A fraction that tau is measured for.
        ({"fraction": 0.0}, "fraction is 0.0; it should be greater than 0"),
        ({"fraction": 10}, r"fraction is 10; it should be at most 1, which is every text token \(0.1 is a tenth\)"),
        ({"hold_fraction": "epoch"}, "hold_fraction is 'epoch', but there is no fraction"),
        ({"fraction": 0.1, "hold_fraction": "always"}, "hold_fraction is 'always'; it should be one of"),
        ({"calibration_samples": 0}, "calibration_samples is 0"),
        # A stream.
        ({**STREAM, "max_steps": None}, "max_steps is not set; a stream has no end"),
        ({**STREAM, "val_fraction": 0.1}, "val_fraction is 0.1 with stream; give val_data"),
        ({**STREAM, "group_by_length": True}, "group_by_length is set with stream"),
        ({**STREAM, "fraction": 0.1, "hold_fraction": "epoch"}, "hold_fraction is 'epoch' with stream"),
        ({**STREAM, "shuffle_buffer": 0}, "shuffle_buffer is 0"),
        # Alignment.
        ({"align_temperature": 0.3}, "align_temperature is 0.3, but there is no align_weight"),
        ({"align_labels": "c.json"}, "align_labels is 'c.json', but there is no align_weight"),
        ({"align_clip": Path("clip")}, "align_clip is clip, but there is no align_weight"),
        ({"align_weight": -1.0}, "align_weight is -1.0; it should be at least 0 and finite"),
        ({"align_weight": float("nan")}, "align_weight is nan"),
        ({"align_weight": 1.0, "align_temperature": 0.0}, "align_temperature is 0.0; it should be greater than 0"),
        ({"align_weight": 1.0, "align_clip": "clip"}, "align_clip and align_words belong together"),
        (
            {"align_weight": 1.0, "align_clip": "clip", "align_words": "w", "align_labels": "c.json"},
            "labels come from the one or the other",
        ),
        ({"align_weight": 1.0, "batch_size": 1}, "batch_size is 1 with align_labels"),
        ({"align_weight": 1.0, "align_labels": "c.json", "images": None}, "images are inside the rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, **change)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_those_that_need_no_further_numbers(name):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0 if "plateau" in name else 1, num_training_steps=4)
    optimizer.step()
    scheduler.step(*([1.0] if "plateau" in name else []))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_cpu_with_amx_computes_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    said: list[str] = []
    assert loading.choose_dtype("bfloat16", said.append) == torch.bfloat16
    assert not said


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_what_needs_a_gpu_falls_back_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    said: list[str] = []
    assert loading.choose_dtype("float16", said.append) == torch.float32
    assert loading.choose_dtype("bfloat16", said.append) == torch.float32
    assert choose_optimizer("paged_adamw_8bit", said.append) == "adamw_torch"
    assert loading.choose_dtype("float32", said.append) == torch.float32
    assert choose_optimizer("adamw_torch", said.append) == "adamw_torch"
    assert said == [
        "float16 needs a GPU, and there is none: float32 is used",
        "bfloat16 needs a GPU, and there is none: float32 is used",
        "paged_adamw_8bit needs a GPU: training with adamw_torch",
    ]
    # Which are bitsandbytes' is no matter of their names' ends alone.
    assert choose_optimizer("adamw_torch_8bit", said.append) == "adamw_torch_8bit"
    assert choose_optimizer("ademamix", said.append) == "adamw_torch"
    assert said[3:] == ["ademamix needs a GPU: training with adamw_torch"]
    with pytest.raises(SetupError, match="optimizer is 'adamx'; it should be one of"):
        choose_optimizer("adamx", said.append)
