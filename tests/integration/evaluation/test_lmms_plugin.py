"""lmms-eval with the model `attanchor`: offline, on tasks from local files, with figures worked by hand."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmms_toy import existence
from PIL import Image

from attanchor_vlm.evaluation import lmms_plugin
from attanchor_vlm.evaluation.lmms_model import as_chat, cut, generation_options
from attanchor_vlm.inference import ask as infer
from attanchor_vlm.model.load import load

ROOT = Path(__file__).parents[3]


# --- What needs no lmms-eval. ----------------------------------------------------------------------------------------


def test_chats_keep_roles_texts_and_the_order_of_images(tmp_path):
    first, second = Image.new("I;16", (4, 4), 0x4000), tmp_path / "b.png"
    Image.new("RGB", (6, 6)).save(second)

    def part(kind, **more):
        return SimpleNamespace(type=kind, **more)

    user = SimpleNamespace(
        role="user",
        content=[part("image", url=first), part("text", text="and"), part("image", url=str(second))],
    )
    system = SimpleNamespace(role="system", content=[part("text", text="be brief")])
    chat, images = as_chat(SimpleNamespace(messages=[system, user]), "t")
    assert [one["role"] for one in chat] == ["system", "user"]
    assert [one["type"] for one in chat[1]["content"]] == ["image", "text", "image"]
    assert [(image.mode, image.size) for image in images] == [("RGB", (4, 4)), ("RGB", (6, 6))]
    assert images[0].getpixel((0, 0)) == (0x40, 0x40, 0x40)  # 16 bits a pixel, not cut off
    video = SimpleNamespace(messages=[SimpleNamespace(role="user", content=[part("video", url="v.mp4")])])
    with pytest.raises(ValueError, match="task clips has video; anchors are inserted in images only"):
        as_chat(video, "clips")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"max_new_tokens": 99, "do_sample": False}),
        # What tasks of lmms-eval have, with settings that other models read.
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "image_aspect_ratio": "original"},
            {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
        ),
        ({"do_sample": True, "temperature": 0}, {"max_new_tokens": 99, "do_sample": False}),
        (
            {"temperature": 0.5, "top_p": 0.9, "until": ["\n"]},
            {"max_new_tokens": 99, "do_sample": True, "temperature": 0.5, "top_p": 0.9},
        ),
    ],
)
def test_generation_settings(given, wanted):
    assert generation_options(given, 99) == wanted


def test_answers_end_at_the_first_stop_string():
    assert cut("yes\n\nUSER: no", ["USER:", "\n\n"]) == "yes"
    assert cut("yes", None) == cut("yes", []) == cut("yes\nno", "\n") == "yes"


def test_the_package_registers_the_model():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition('[project.entry-points."lmms_eval.models"]')[2].partition("\n[")[0]
    name, value = re.search(r'(\w+) = "([\w.:]+)"', section).groups()
    assert name == "attanchor"
    assert EntryPoint(name, value, "lmms_eval.models").load() is lmms_plugin.manifest


# --- The model, through lmms-eval itself. ----------------------------------------------------------------------------


TASK = """
task: scenes
dataset_path: json
dataset_kwargs:
  data_files: {test: ROWS}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 4, until: ["\\n"]}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_registered_model_runs_a_task_from_local_files(lmms_eval, world, tmp_path, monkeypatch, tau):
    """As `lmms-eval --model attanchor --tasks scenes --include_path DIR` would, without the network."""
    from lmms_eval.models import registry_v2
    from lmms_eval.tasks import TaskManager

    entry = EntryPoint("attanchor", "attanchor_vlm.evaluation.lmms_plugin:manifest", "lmms_eval.models")
    monkeypatch.setattr(registry_v2.ModelRegistryV2, "_select_entry_points", lambda self, group: [entry])
    registry = registry_v2.ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.list_model_names() == ["attanchor"]
    monkeypatch.setattr(lmms_eval.models, "get_model", registry.get_model_class)

    asked = existence(world)
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "tasks"
    lines = [json.dumps({"question": text, "answer": truth, "file": str(file)}) for text, truth, file in asked]
    rows.write_text("\n".join(lines))
    folder.mkdir()
    (folder / "scenes.yaml").write_text(TASK.replace("ROWS", str(rows)))
    code = 'from PIL import Image\n\ndef visual(doc):\n    return [Image.open(doc["file"]).convert("RGB")]\n'
    (folder / "utils.py").write_text(code)

    results = lmms_eval.simple_evaluate(
        "attanchor",
        model_args=f"pretrained={world / 'model'},tau={tau}",
        batch_size=3,
        tasks=["scenes"],
        task_manager=TaskManager("ERROR", include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    model, processor = load(str(world / "model"), tau=tau)
    answers = [infer.answer(model, processor, text, [file], max_new_tokens=4) for text, _, file in asked]
    said = [sample["filtered_resps"][0] for sample in results["samples"]["scenes"]]
    assert said == [one.text for one in answers]
    assert (sum(one.inserted for one in answers) > 0) == (tau < 1)
    right = sum(one.text == truth for one, (_, truth, _) in zip(answers, asked, strict=True))
    assert results["results"]["scenes"]["exact_match,none"] == pytest.approx(right / len(asked))
    assert right > len(asked) / 2  # it has learnt such questions


def test_model_args_that_mean_nothing_are_refused(lmms_eval, world):
    from attanchor_vlm.evaluation.lmms_model import AttAnchorLmms

    with pytest.raises(ValueError, match=r"model_args hold \['taw'\]"):
        AttAnchorLmms(str(world / "model"), taw=0.1)
    with pytest.raises(ValueError, match="dtype is 'half'"):
        AttAnchorLmms(str(world / "model"), dtype="half")
    with pytest.raises(ValueError, match="batch_size is 'auto'; it should be a whole number"):
        AttAnchorLmms(str(world / "model"), batch_size="auto")
