"""Greedy tokens of vLLM and of `generate`, in one process: a family, several settings, chats of every kind.

    python tests/serve/same_tokens.py llava 60

Prints a JSON object for every setting. One engine serves all of them: it only sees rows. Prompts are prefilled in
chunks, in one batch, and everything is asked twice, the second time with a filled prefix cache.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads that wait busily for a core of their own are slow beside others
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
sys.path.insert(0, str(Path(__file__).parents[1] / "integration" / "support"))

import checkpoints
import pytest
import tiny_families
import torch

from attanchor_vlm import AttAnchorConfig, attach, encode_chat

NEW = 8
SETTINGS = {
    "low": {"tau": -1},
    "middle": {"tau": 0.1},
    "one": {"tau": 1},
    "budget": {"tau": -1, "max_anchors": 3},
    "keep": {"tau": 0.1, "keep": 0.34},
    "sequential": {"tau": 0.1, "positions": "sequential"},
    "reverse": {"tau": -1, "max_anchors": 4, "direction": "image_into_text"},
}
TEXTS = ["What is to the left of the red dog?", "Is there a cat in the picture? And now?", "The sky is grey."]
# vLLM's attention on a CPU has no narrower heads than these.
WIDE = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}


def chat(index: int) -> tuple[list[dict], list]:
    """One image twice, two images, two turns, none; texts and pictures change with the index too."""

    def text(shift: int) -> dict:
        return {"type": "text", "text": f"{TEXTS[(index + shift) % 3]} {index // 15}"}

    image, kind = {"type": "image"}, index % 5
    asked = {"role": "user", "content": [*[image] * (1, 1, 2, 1, 0)[kind], text(0)]}
    pictures = [checkpoints.picture(index + place) for place in range(asked["content"].count(image))]
    if kind != 3:
        return [asked], pictures
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes, two cats."}]}
    return [asked, answer, {"role": "user", "content": [text(1)]}], pictures


def said(model, processor, conversation: list[dict], pictures: list) -> tuple[list[int], int]:
    """The tokens of `generate`, and the number of anchors."""
    batch = encode_chat(processor, [conversation], [pictures], add_generation_prompt=True)
    if not pictures:
        del batch["anchor_mask"]
    tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0, batch["input_ids"].shape[1] :]
    plan = model.attanchor_plan
    return tokens.tolist(), 0 if plan is None else int(plan.is_anchor.sum())


def main(name: str, count: int) -> None:
    torch.set_num_threads(1)
    tiny_families.TEXT |= WIDE
    tiny_families.MROPE["rope_parameters"]["mrope_section"] = [8, 4, 4]
    chats = [chat(index) for index in range(count)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        model, processor = checkpoints.write(Path(folder) / "model", name, patch)
        model.generation_config.eos_token_id = None
        expected = {}
        for setting, values in SETTINGS.items():
            attach(model, AttAnchorConfig(**values))
            expected[setting] = [said(model, processor, *one) for one in chats]

        from vllm import LLM, SamplingParams

        from attanchor_vlm.inference.vllm import ARCHITECTURE, MODE

        engine = LLM(
            f"{folder}/model",
            tokenizer_mode=MODE,
            hf_overrides={"architectures": [ARCHITECTURE], "attanchor": {"tau": 0.5}},
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=64,
            block_size=32,
            kv_cache_memory_bytes=64 << 20,
            mm_processor_cache_gb=0,
            distributed_executor_backend="uni",
        )
        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        messages = [given(*one) for one in chats]
        for setting, values in SETTINGS.items():
            attach(engine.llm_engine.renderer.front.model, AttAnchorConfig(**values))
            first, second = (engine.chat(messages, sampling, use_tqdm=False) for _ in range(2))
            row = {
                "setting": setting,
                "values": values,
                "expected": [tokens for tokens, _ in expected[setting]],
                "inserted": [number for _, number in expected[setting]],
                "first": [list(output.outputs[0].token_ids) for output in first],
                "second": [list(output.outputs[0].token_ids) for output in second],
                "cached": [output.num_cached_tokens for output in second],
            }
            print("ROW", json.dumps(row), flush=True)


def given(conversation: list[dict], pictures: list) -> list[dict]:
    """A chat as vLLM takes it, with its images in it."""
    left = iter(pictures)

    def part(one: dict) -> dict:
        return {"type": "image_pil", "image_pil": next(left)} if one["type"] == "image" else one

    return [{**message, "content": [part(one) for one in message["content"]]} for message in conversation]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
