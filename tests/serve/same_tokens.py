"""Greedy tokens of vLLM and of `generate`, in one process: families, several settings, chats of every kind.

    python tests/serve/same_tokens.py llava,glm4v 60 low,keep

Prints a JSON object for every family and setting. One engine serves all settings: it only sees rows. Prompts are
prefilled in chunks, in one batch, and everything is asked twice, the second time with a filled prefix cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # nor is anything compiled for norms
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads that wait busily for a core of their own are slow beside others
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
sys.path.insert(0, str(Path(__file__).parents[1] / "integration" / "support"))

import checkpoints
import pytest
import table_families
import table_sizes
import tiny_families
import torch

from attanchor_vlm import AttAnchorConfig, attach, encode_chat

NEW = 8
# Every class of vLLM's in LANGUAGE_MODELS has one of its families here; those with other images stand below.
FAMILIES = ("llava", "qwen2_5_vl", "aya_vision", "glm4v", "lighton_ocr", "mistral3", "paddleocr_vl", "qwen3_vl")
OTHERS = ("cohere2_vision", "deepseek_vl", "glm46v", "glm_ocr", "got_ocr2", "idefics2", "idefics3", "internvl", "janus")
OTHERS += ("llava_next", "llava_next_video", "llava_onevision", "qwen2_5_omni_thinker", "qwen2_vl", "smolvlm")
OTHERS += ("video_llama_3", "video_llava")
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


def said(model, batch: dict) -> tuple[list[int], int]:
    """The tokens of `generate`, and the number of anchors."""
    tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0, batch["input_ids"].shape[1] :]
    plan = model.attanchor_plan
    return tokens.tolist(), 0 if plan is None else int(plan.is_anchor.sum())


class Chats:
    """Of a family with a processor: vLLM gets conversations."""

    def __init__(self, folder: Path, name: str, count: int, patch: pytest.MonkeyPatch) -> None:
        self.model, self.processor = checkpoints.write(folder, name, patch)
        self.chats = [chat(index) for index in range(count)]

    def batches(self) -> list[dict]:
        found = []
        for conversation, pictures in self.chats:
            batch = encode_chat(self.processor, [conversation], [pictures], add_generation_prompt=True)
            if not pictures:
                del batch["anchor_mask"]
            found.append(batch)
        return found

    def ask(self, engine, sampling) -> list:
        return engine.chat([given(*one) for one in self.chats], sampling, use_tqdm=False)


class Tensors:
    """Of a family with none: vLLM gets what its front makes of ids and pixels."""

    def __init__(self, folder: Path, name: str, count: int, patch: pytest.MonkeyPatch) -> None:
        family = next(family for family in table_families.TABLE if family.name == name)
        self.model = family.model()
        self.model.save_pretrained(folder)
        checkpoints.tokenizer().save_pretrained(folder)
        images = [[(1, 1, 2, 1, 0)[index % 5]] for index in range(count)]
        self.prompts = [family.prompts(number, seed=index)[0] for index, number in enumerate(images)]
        patch.setattr("attanchor_vlm.model.processors.load_processor", lambda source: None)

    def batches(self) -> list[dict]:
        return self.prompts

    def ask(self, engine, sampling) -> list:
        from vllm.inputs.engine import tokens_input

        from attanchor_vlm.inference.vllm.model import engine_input

        renderer, found = engine.llm_engine.renderer, {}
        for index, batch in enumerate(self.prompts):
            images = "anchor_mask" in batch
            ids = batch["input_ids"][0].tolist()
            made = engine_input(renderer.front.prompt(batch)) if images else tokens_input(ids)
            engine.llm_engine.add_request(str(index), made, sampling)
        while engine.llm_engine.has_unfinished_requests():
            found |= {int(output.request_id): output for output in engine.llm_engine.step() if output.finished}
        return [found[index] for index in range(len(self.prompts))]


def main(names: list[str], count: int, settings: list[str]) -> None:
    torch.set_num_threads(1)
    tiny_families.TEXT |= WIDE
    table_sizes.TEXT |= WIDE
    tiny_families.MROPE["rope_parameters"]["mrope_section"] = [8, 4, 4]
    table_sizes.config = widened(table_sizes.config)
    for name in names:
        if name == "qwen3_vl" and not importlib.util.find_spec("torchvision"):
            print(f"{name}: left out, since vLLM's module of it needs torchvision", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            for row in compare(name, count, settings, Path(folder) / "model", patch):
                print("ROW", json.dumps({"family": name, **row}), flush=True)


def compare(name: str, count: int, settings: list[str], folder: Path, patch: pytest.MonkeyPatch) -> Iterator[dict]:
    """What is said for each setting."""
    for sizes in (table_sizes.TEXT, table_sizes.IDS):  # Cohere's head is the embedding table
        patch.setitem(sizes, "tie_word_embeddings", name in ("aya_vision", "cohere2_vision"))
    needs = checkpoints.NEEDS.get(name)
    written = name in checkpoints.WRITERS | checkpoints.FURTHER and (not needs or importlib.util.find_spec(needs))
    prompts = (Chats if written else Tensors)(folder, name, count, patch)
    model = prompts.model
    model.generation_config.eos_token_id = None
    expected = {}
    for setting in settings:
        attach(model, AttAnchorConfig(**SETTINGS[setting]))
        expected[setting] = [said(model, dict(batch)) for batch in prompts.batches()]

    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from attanchor_vlm.inference.vllm import MODE
    from attanchor_vlm.inference.vllm.front import overrides

    model.config.attanchor = {"tau": 0.5}
    engine = LLM(
        str(folder),
        tokenizer_mode=MODE,
        hf_overrides=overrides(model.config),
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
    for setting in settings:
        attach(engine.llm_engine.renderer.front.model, AttAnchorConfig(**SETTINGS[setting]))
        first, second = (prompts.ask(engine, sampling) for _ in range(2))
        yield {
            "setting": setting,
            "values": SETTINGS[setting],
            "expected": [tokens for tokens, _ in expected[setting]],
            "inserted": [number for _, number in expected[setting]],
            "first": [list(output.outputs[0].token_ids) for output in first],
            "second": [list(output.outputs[0].token_ids) for output in second],
            "cached": [output.num_cached_tokens for output in second],
        }
    del engine
    cleanup_dist_env_and_memory()


def widened(config):
    """M-RoPE's sections fill the wider heads."""

    def wide(*args):
        made = config(*args)
        rope = made.get_text_config().rope_parameters or {}
        if old := rope.get("mrope_section"):
            rope["mrope_section"] = [part * (WIDE["head_dim"] // 2) // sum(old) for part in old]
        return made

    return wide


def given(conversation: list[dict], pictures: list) -> list[dict]:
    """A chat as vLLM takes it, with its images in it."""
    left = iter(pictures)

    def part(one: dict) -> dict:
        return {"type": "image_pil", "image_pil": next(left)} if one["type"] == "image" else one

    return [{**message, "content": [part(one) for one in message["content"]]} for message in conversation]


if __name__ == "__main__":
    chosen = [*FAMILIES, *OTHERS] if sys.argv[1] == "all" else sys.argv[1].split(",")
    main(chosen, int(sys.argv[2]), sys.argv[3].split(",") if sys.argv[3:] else list(SETTINGS))
