"""Start vLLM's own API server on an attached model."""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from attanchor_vlm.errors import SetupError
from attanchor_vlm.inference.vllm import MODE
from attanchor_vlm.inference.vllm.front import overrides, settings_of
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.load import source_of

# Without a GPU: the arithmetic of `attanchor generate`, no compilation, and a KV cache that leaves memory to others.
ON_CPU = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30))


def check_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises:
        SetupError: with the command that installs it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SetupError(
            "vLLM is not installed here; give it an environment of its own, since it wants an older transformers: "
            "`pip install vllm '.[serve]'` in a clone, or on a machine without a GPU as docs/serve.md says"
        )


def check_model(model: str, settings: AttAnchorConfig) -> dict[str, Any]:
    """Refuse, by its config alone, a model that cannot be served; what vLLM is to change in that config.

    Raises:
        SetupError: there is no such model.
        ServingError: the reason.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source_of(model), trust_remote_code=False)
    config.attanchor = settings.to_dict()
    settings_of(config)
    return overrides(config)


def server_command(
    model: str, name: str, changes: dict[str, Any], host: str, port: int, options: Sequence[str] = ()
) -> list[str]:
    """The command that starts vLLM's server; of an option that is given twice, the last one counts.

    Args:
        model: The folder of a saved model, adapters merged, or a Hub id.
        name: By which requests ask for it.
        changes: From `check_model`.
        options: vLLM's own.
    """
    own: dict[str, Any] = {
        "--model": model,
        "--served-model-name": name,
        "--tokenizer-mode": MODE,
        "--hf-overrides": json.dumps(changes),
        "--mm-processor-cache-gb": 0,  # rows go by the cache of images
        "--middleware": f"{__package__}.counts.CountHeaders",
        "--host": host,
        "--port": port,
    }
    words = [str(word) for pair in own.items() for word in pair]
    on_cpu = () if torch.cuda.is_available() else ON_CPU
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *on_cpu, *options]


def announced(name: str, host: str, port: int, options: Sequence[str] = ()) -> tuple[str, str, str]:
    """The server's address, the name of its model and the header that it asks for, which vLLM's own options may say.

    The header is quoted for a shell, empty without a key. One of the environment stays there: output may be kept.

    Raises:
        SetupError: one of these options lacks its value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default=host)
    parser.add_argument("--port", default=port)
    parser.add_argument("--served-model-name", "--served_model_name", nargs="+", default=[name])
    parser.add_argument("--api-key", "--api_key", nargs="+")
    try:
        given, _ = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise SetupError(f"behind --, {error}") from error
    at, header = f"[{given.host}]" if ":" in given.host else given.host, ""
    if given.api_key:
        header = shlex.quote(f"Authorization: Bearer {given.api_key[0]}")
    elif os.environ.get("VLLM_API_KEY"):
        header = '"Authorization: Bearer $VLLM_API_KEY"'
    return f"http://{at}:{given.port}", given.served_model_name[0], header


def curl_line(address: str, name: str, header: str = "") -> str:
    """A request with a small picture, as a shell takes it."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"model": name, "messages": [{"role": "user", "content": parts}], "max_tokens": 32, "temperature": 0}
    request = ["curl", "-i", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json"]
    return f"{shlex.join(request)} {f'-H {header} ' if header else ''}{shlex.join(['-d', json.dumps(body)])}"


def run_server(command: Sequence[str], address: str, ready: Callable[[], object]) -> int:
    """Run the server until it ends, or is told to by SIGTERM or SIGINT; returns its exit code.

    Args:
        ready: Called once, when it answers.
    """
    with subprocess.Popen(command) as server, _passing_on(server):
        try:
            while server.poll() is None and not answers(address):
                time.sleep(0.5)
            if server.poll() is None:
                ready()
            return server.wait()
        except BaseException:
            server.terminate()  # it does not outlive the command, nor the model that it serves
            raise


@contextlib.contextmanager
def _passing_on(server: subprocess.Popen) -> Iterator[None]:
    """Signals go to the server, which ends in its own way."""

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(address: str) -> bool:
    """Whether a server is ready there; never by a proxy."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/health", timeout=5):
            return True
    except (OSError, http.client.HTTPException):  # the latter from what speaks no HTTP, such as a server behind TLS
        return False
