"""`attanchor serve` up to the point where vLLM begins, and what it serves: the whole model, its adapter merged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from builders import BY_NAME
from infer_toy import free_port
from tiny import prompts, tiny_llava

from attanchor_vlm import AttAnchorConfig, answer, attach, cli, load
from attanchor_vlm.errors import SetupError
from attanchor_vlm.inference.vllm import launch
from attanchor_vlm.inference.widen import widen_heads

QUESTION = "Where is the purple triangle?"


def error_of(capsys, *arguments):
    assert cli.main(["serve", *map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_without_vllm_the_command_that_installs_it_is_named(sample, monkeypatch, capsys):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    line = error_of(capsys, "--model", sample / "model", "--tau", "0.6")
    assert line.startswith("error: vLLM is not installed here")
    assert "pip install vllm '.[serve]'" in line


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "check_vllm", lambda: None)
    assert "has no AttAnchor settings; give --tau" in error_of(capsys, "--model", sample / "model")
    BY_NAME["gemma3"].model().config.save_pretrained(tmp_path)
    assert "gemma3 cannot be served with anchors: its image tokens" in error_of(
        capsys, "--model", tmp_path, "--tau", "0.5"
    )


def test_options_behind_the_dashes_win(sample, monkeypatch):
    monkeypatch.setattr(launch, "check_vllm", lambda: None)
    ran = []
    monkeypatch.setattr(launch, "run_server", lambda command, address, ready: ran.append((command, address)) or 3)
    options = ["--tau", "0.6", "--keep", "0.5", "--port", "1234", "--", "--host=::1", "--dtype", "bfloat16"]
    assert cli.main(["serve", "--model", str(sample / "model"), *options]) == 3
    ((command, address),) = ran
    assert address == "http://[::1]:1234"
    assert command[-2:] == ["--dtype", "bfloat16"]
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert overrides["architectures"] == ["AttAnchorForConditionalGeneration"]
    assert AttAnchorConfig.from_dict(overrides["attanchor"]) == AttAnchorConfig(tau=0.6, keep=0.5)


def test_what_is_announced_is_what_the_options_behind_the_dashes_say(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert launch.announced("m", "127.0.0.1", 8000) == ("http://127.0.0.1:8000", "m", "")
    options = ["--port", "1", "--served-model-name", "wide", "w", "--max-model-len", "512", "--host=0.0.0.0"]
    assert launch.announced("m", "127.0.0.1", 8000, options) == ("http://0.0.0.0:1", "wide", "")
    options = ["--served_model_name=w"]  # as vLLM takes them too
    assert launch.announced("m", "127.0.0.1", 8000, options)[1] == "w"
    with pytest.raises(SetupError, match=r"^behind --, argument --port: expected one argument$"):
        launch.announced("m", "127.0.0.1", 8000, ["--port"])


@pytest.mark.parametrize(
    ("options", "sent"), [(["--api-key", "it's $1", "other"], "it's $1"), (["--api-key=k"], "k"), ([], "of the shell")]
)
def test_the_printed_line_has_the_key_that_the_server_asks_for(options, sent, monkeypatch):
    """Of the options, or of the environment, whose secret is not printed."""
    monkeypatch.setenv("VLLM_API_KEY", "of the shell")
    line = launch.curl_line(*launch.announced("it's mine", "127.0.0.1", 8000, options))
    assert "of the shell" not in line
    words = subprocess.check_output(["sh", "-c", line.replace("curl", "printf '%s\\n'", 1)], text=True).splitlines()
    assert words[words.index(f"Authorization: Bearer {sent}") - 1] == "-H"
    assert words[:2] == ["-i", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[-1])
    assert body["model"] == "it's mine"
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
    def log_message(self, *said):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_announced_when_it_answers_and_ended_by_the_signal():
    """The signal reaches it; its exit code is the command's."""
    port, ready, before = free_port(), [], signal.getsignal(signal.SIGTERM)

    def announce():
        ready.append(port)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    command = [sys.executable, "-c", SERVER, str(port)]
    assert launch.run_server(command, f"http://127.0.0.1:{port}", announce) == 7
    assert ready == [port]
    assert signal.getsignal(signal.SIGTERM) is before
    assert launch.run_server([sys.executable, "-c", "raise SystemExit(5)"], f"http://127.0.0.1:{port}", announce) == 5
    assert ready == [port]


DEAF = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
for _ in range(2):
    listening.accept()[0].sendall(b"no HTTP\\n\\n")
sys.exit(6)
"""


def test_what_answers_in_another_language_is_waited_for_without_a_proxy(monkeypatch):
    """A server behind TLS says nothing that HTTP knows; it goes on to its own end."""
    port = free_port()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    command = [sys.executable, "-c", DEAF, str(port)]
    assert launch.run_server(command, f"http://127.0.0.1:{port}", lambda: pytest.fail("it is not ready")) == 6


def test_a_server_does_not_outlive_a_command_that_fails(monkeypatch):
    monkeypatch.setattr(launch, "answers", lambda address: 1 / 0)
    started = []
    popen = launch.subprocess.Popen
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command: started.append(popen(command)) or started[0])
    with pytest.raises(ZeroDivisionError):
        launch.run_server([sys.executable, "-c", "import time; time.sleep(60)"], "http://127.0.0.1", print)
    assert started[0].returncode == -signal.SIGTERM


def test_what_is_exported_or_served_is_the_model_with_its_adapter_and_its_settings(
    sample, adapter, tmp_path, monkeypatch, capsys
):
    options = ["--adapter", adapter, "--output", tmp_path / "whole", "--head-dim", "32", "--json"]
    assert cli.main(["export", "--model", str(sample / "model"), *map(str, options)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["architecture"], said["settings"]) == ("LlavaForConditionalGeneration", "config.json")

    adapted, processor = load(str(sample / "model"), adapter)
    whole, _ = load(str(tmp_path / "whole"))
    image = sorted((sample / "images").iterdir())[1]
    expected = answer(adapted, processor, QUESTION, image, max_new_tokens=8)
    assert expected.inserted == 3
    assert answer(whole, processor, QUESTION, image, max_new_tokens=8) == expected
    assert whole.config.text_config.head_dim == 32

    def look(command, address, ready):
        folders.append(command[command.index("--model") + 1])
        served, _ = load(folders[0])
        assert answer(served, processor, QUESTION, image, max_new_tokens=8) == expected
        return 0

    folders = []
    monkeypatch.setattr(launch, "check_vllm", lambda: None)
    monkeypatch.setattr(launch, "run_server", look)
    assert cli.main(["serve", "--model", str(sample / "model"), "--adapter", str(adapter)]) == 0
    assert not os.path.exists(folders[0])


def test_wider_heads_compute_the_same():
    batch = prompts([1, 2])
    plain, wide = (attach(tiny_llava(), AttAnchorConfig(tau=-1, max_anchors=3)) for _ in range(2))
    widen_heads(wide, 32)
    assert wide.model.language_model.layers[0].self_attn.q_proj.out_features == 4 * 32
    with torch.no_grad():
        assert torch.allclose(wide(**batch).logits, plain(**batch).logits, atol=1e-4)
    with pytest.raises(ValueError, match="head_dim is 40; it should be a multiple of 32"):
        widen_heads(wide, 40)
    with pytest.raises(ValueError, match="head_dim is 32, but heads of qwen2_vl_text with its RoPE cannot be widened"):
        widen_heads(BY_NAME["qwen2_vl"].model(), 32)
