"""The server of `attanchor serve` on the sample model, over loopback: answers, malformed and hostile requests."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from attanchor_lab.sample import write_sample
from attanchor_vlm import answer, cli, load

TAU = 0.6
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "no_proxy": "127.0.0.1"}
QUIET |= {"VLLM_MEDIA_FETCH_MAX_RETRIES": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "sample"
    write_sample(folder)
    wide = ["export", "--model", str(folder / "model"), "--tau", str(TAU), "--head-dim", "32"]
    assert cli.main([*wide, "--output", str(folder / "wide")]) == 0
    return folder


class Server:
    """A running server: its process, its address, the line that it prints."""

    def __init__(self, process, address, curl):
        self.process, self.address, self.curl = process, address, curl

    def post(self, path, body):
        """Status, headers and the parsed body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.headers, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.load(error)

    def ask(self, *parts, **options):
        return self.post("/v1/chat/completions", chat(*parts, **options))


@pytest.fixture(scope="module")
def server(sample):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "attanchor_vlm.cli", "serve", "--model", sample / "wide"]
    limits = ["--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20)]
    vllm = ["--", "--port", str(port), "--served-model-name", "wide", *limits]
    log = (sample / "log").open("w")
    process = subprocess.Popen(
        [*command, *vllm], stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | QUIET | ONE_THREAD
    )
    said, limit = [], threading.Timer(600, process.terminate)
    limit.start()
    for line in process.stdout:
        said.append(line)
        if line.startswith("curl "):
            break
    else:
        pytest.fail((sample / "log").read_text()[-3000:])
    limit.cancel()
    threading.Thread(target=process.stdout.read, daemon=True).start()
    yield Server(process, f"http://127.0.0.1:{port}", said[-1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def encoded(image, kind="PNG"):
    data = image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        data = buffer.getvalue()
    elif isinstance(image, Path):
        data = image.read_bytes()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def text(said):
    return {"type": "text", "text": said}


def chat(*parts, **options):
    messages = [{"role": "user", "content": list(parts)}]
    return {"model": "wide", "messages": messages, "max_tokens": 8, "temperature": 0, **options}


@pytest.fixture(scope="module")
def asked(sample):
    """Questions of the test file about its images, and what `generate` says: (image, question, answer, inserted)."""
    model, processor = load(str(sample / "wide"))
    rows = json.loads((sample / "test.json").read_text())[:16]
    found = []
    for row in rows:
        image, question = (
            sample / "images" / row["image"],
            row["conversations"][0]["value"].replace("<image>", "").strip(),
        )
        said = answer(model, processor, question, image, max_new_tokens=8)
        found.append((image, question, said.text, said.inserted))
    return found


def test_eight_clients_get_the_answers_of_generate(server, asked):
    def ask(one):
        image, question, expected, inserted = one
        status, headers, body = server.ask(encoded(image), text(question))
        assert status == 200
        assert body["choices"][0]["message"]["content"].strip() == expected
        assert headers["x-attanchor-inserted"] == str(inserted)
        assert headers["x-attanchor-kept"] == "64"
        return inserted

    with ThreadPoolExecutor(8) as clients:
        assert sum(clients.map(ask, asked * 2)) > 0


def test_an_image_is_fetched_from_its_address(server, asked):
    image, question, expected, _ = asked[0]
    files = functools.partial(http.server.SimpleHTTPRequestHandler, directory=image.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), files) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}/{image.name}"
        found, missing = (
            server.ask({"type": "image_url", "image_url": {"url": url}}, text(question))
            for url in (address, f"{address}.gone")
        )
        web.shutdown()
    assert found[0] == 200, found
    assert found[2]["choices"][0]["message"]["content"].strip() == expected
    assert 400 <= missing[0] < 500, missing


def test_the_printed_line_works(server):
    line = [*shlex.split(server.curl), "--silent", "--fail", "--max-time", "120"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "x-attanchor-kept: 64" in done.stdout
    assert '"object":"chat.completion"' in done.stdout


def test_an_answer_streams_and_the_openai_client_reads_it(server, asked):
    from openai import OpenAI

    image, question, expected, _ = next(one for one in asked if " " in one[2])
    client = OpenAI(base_url=f"{server.address}/v1", api_key="none")
    stream = client.chat.completions.create(**chat(encoded(image), text(question)), stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 2
    assert "".join(parts).strip() == expected


SMALL = Image.new("RGB", (64, 64), "red")
WHERE = text("Where is it?")
MISTAKES = {
    "no image": lambda: chat(encoded(b""), WHERE),
    "no image's bytes": lambda: chat(encoded(b"abc" * 99), WHERE),
    "a program for Ghostscript": lambda: chat(encoded(Image.new("RGB", (8, 8)), "EPS"), WHERE),
    "half an image": lambda: chat(encoded(base64.b64decode(encoded(SMALL)["image_url"]["url"][22:])[:60]), WHERE),
    "more pixels than memory": lambda: chat(encoded(Image.new("1", (20000, 20000))), WHERE),
    "a line": lambda: chat(encoded(Image.new("RGB", (1, 4000))), WHERE),
    "a hundred images": lambda: chat(*[encoded(SMALL)] * 100, WHERE),
    "a thousand images": lambda: chat(*[encoded(Image.new("RGB", (8, 8)))] * 1000, WHERE),
    "a file of the server's": lambda: chat({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, WHERE),
    "nobody's address": lambda: chat({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}, WHERE),
    "a placeholder in the text": lambda: chat(encoded(SMALL), text("<image> hi")),
    "more text than context": lambda: chat(encoded(SMALL), text("word " * 5000)),
    "a video": lambda: chat({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, WHERE),
    "features": lambda: chat({"type": "image_embeds", "image_embeds": "AAAA"}, WHERE),
    "empty features": lambda: chat({"type": "image_embeds", "image_embeds": ""}, WHERE),
    "other image sizes": lambda: chat(encoded(SMALL), WHERE, mm_processor_kwargs={"size": {"height": 9, "width": 9}}),
    "an answer to go on with": lambda: chat(WHERE, add_generation_prompt=False, continue_final_message=True),
    "variables in the template's place": lambda: chat(WHERE, chat_template_kwargs={"conversation": 1}),
    "no content": lambda: {"model": "wide", "messages": [{"role": "user", "content": None}]},
    "no messages": lambda: {"model": "wide", "messages": []},
    "half a body": lambda: b'{"model":',
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_clients_mistake_is_the_clients(server, mistake):
    status, _, body = server.post("/v1/chat/completions", MISTAKES[mistake]())
    assert 400 <= status < 500, body
    assert body["error"]["message"]
    assert server.ask(encoded(SMALL), WHERE)[0] == 200


def test_rows_from_outside_are_refused(server):
    body = {"model": "wide", "prompt_embeds": base64.b64encode(b"rows").decode(), "max_tokens": 2}
    assert server.post("/v1/completions", body)[0] == 400


def running(server):
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=30) as response:
        metrics = response.read().decode()
    return sum(float(number) for number in re.findall(r"^vllm:num_requests_running\S* (\S+)$", metrics, re.MULTILINE))


def test_a_client_that_leaves_costs_nothing(server, asked):
    image, question, expected, _ = asked[0]
    body = json.dumps(chat(encoded(image), text(question), max_tokens=400, ignore_eos=True, stream=True)).encode()
    host, port = server.address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for _ in range(4):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert client.recv(64).startswith(b"HTTP/1.1 200")
    status, _, answered = server.ask(encoded(image), text(question))
    assert status == 200
    assert answered["choices"][0]["message"]["content"].strip() == expected
    for _ in range(100):
        if not running(server):
            break
        threading.Event().wait(0.1)
    assert running(server) == 0
