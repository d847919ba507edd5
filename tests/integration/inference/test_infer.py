"""`attanchor generate` and its Python: one question, and the pages that show them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from infer_toy import QUESTION, TAU, run

from attanchor_vlm import AttAnchorConfig, attach, cli, encode_chat, save_settings
from attanchor_vlm.analysis.probe import FOLLOWS
from attanchor_vlm.errors import SetupError
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.inference import ask as infer
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.load import load, settings_for
from attanchor_vlm.training.lora import lora_targets


@pytest.fixture(scope="module")
def pictures(sample):
    return sorted((sample / "images").glob("test-*.png"))


# --- One question. ---------------------------------------------------------------------------------------------------


def test_an_answer_is_what_generate_gives(loaded, pictures):
    model, processor = loaded
    image = infer.open_image(pictures[0])
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    batch = encode_chat(processor, chat, [image], add_generation_prompt=True)
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    inserted = int(model.attanchor_plan.is_anchor.sum())
    for given in (image, pictures[0], str(pictures[0])):
        assert infer.answer(model, processor, QUESTION, [given], max_new_tokens=8) == (expected, inserted, 6)
    assert 0 < inserted < 6
    # Longer options reach generate; a plain model answers as well.
    assert infer.answer(model, processor, QUESTION, [image], max_new_tokens=1).text == expected.split()[0]
    plain, _ = load(str(loaded[0].config._name_or_path), tau=1)
    assert infer.answer(plain, processor, QUESTION, [image], max_new_tokens=8).inserted == 0


def test_images_go_in_front_or_where_the_prompt_says(loaded, pictures):
    model, processor = loaded
    texts = ["first <image> then <image> what?", "first then what?"]
    for text, in_front in zip(texts, ("USER:first", "USER:"), strict=True):
        infer.answer(model, processor, text, pictures[:2], max_new_tokens=1)
        ids = model.attanchor_plan.input_ids[0]
        is_image = ids == processor.image_token_id
        assert int(is_image.sum()) == 2 * 64
        before = processor.tokenizer.decode(ids[: int(is_image.nonzero()[0])])
        assert re.sub(r"\s", "", before) == in_front
    with pytest.raises(ValueError, match="the prompt has 2 <image> placeholders for 1 image; there should be one"):
        infer.answer(model, processor, texts[0], pictures[:1])
    assert infer.answer(model, processor, "Where is the red ring?", max_new_tokens=2).inserted == 0


def test_a_batch_is_its_questions_alone(loaded, pictures):
    model, processor = loaded
    prompts = ["Is there a red ring in the picture?", "And in both?", "What colour is the disc?"]
    images = [pictures[:1], pictures[:2], pictures[2:3]]
    together = infer.answers(model, processor, prompts, images, max_new_tokens=6)
    alone = [infer.answer(model, processor, p, i, max_new_tokens=6) for p, i in zip(prompts, images, strict=True)]
    assert together == alone
    assert len({answer.text for answer in together}) > 1


def test_a_single_image_needs_no_list(loaded, pictures):
    expected = infer.answer(*loaded, QUESTION, pictures[:1], max_new_tokens=4)
    for image in (pictures[0], str(pictures[0]), infer.open_image(pictures[0])):
        assert infer.answer(*loaded, QUESTION, image, max_new_tokens=4) == expected
        assert infer.answers(*loaded, [QUESTION], [image], max_new_tokens=4) == [expected]
    text, inserted, candidates = infer.answers(*loaded, [QUESTION, QUESTION], [image, []], max_new_tokens=4)[1]
    assert (inserted, candidates) == (0, 0)  # without an image, no word takes part
    assert text


@pytest.mark.parametrize(
    ("prompts", "images", "options", "message"),
    [
        ([QUESTION], [[]], {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2, but a question"),
        ([QUESTION], [[]], {"return_dict_in_generate": True}, "return_dict_in_generate is True"),
        ([QUESTION, QUESTION], [[]], {}, "there are 2 prompts and images for 1; prompts should be a list"),
        (QUESTION, [[]], {}, "there is 1 prompt and images for 1; prompts should be a list"),
        ([QUESTION], ["gone.png"], {}, "image gone.png cannot be read: No such file"),
    ],
)
def test_what_has_no_single_answer_is_refused_before_generating(loaded, monkeypatch, prompts, images, options, message):
    monkeypatch.setattr(type(loaded[0]), "generate", None)
    with pytest.raises(ValueError, match=message):
        infer.answers(*loaded, prompts, images, **options)


def test_an_adapter_of_another_model_is_one_error(sample, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    model, _ = loading.load_pretrained(str(sample / "model"))
    model.config.text_config.intermediate_size *= 2
    wider = type(model)(model.config)
    wrapped = get_peft_model(wider, LoraConfig(r=2, target_modules=lora_targets(wider)))
    wrapped.save_pretrained(tmp_path)
    save_settings(AttAnchorConfig(tau=TAU), tmp_path)
    code, out, line = run(capsys, "generate", "--model", sample / "model", "--adapter", tmp_path, "--prompt", "a")
    assert (code, out) == (1, "")
    assert line.startswith(f"error: adapter {tmp_path} does not fit model {sample / 'model'}, which it should")
    assert "size mismatch" in line
    data = ["--data", sample / "test.json", "--images", sample / "images"]
    code, _, other = run(capsys, "probe", "--model", sample / "model", *data, "--adapter", tmp_path, "--json")
    assert (code, other) == (1, line)

    for file in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(whole[: len(whole) // 2])
        code, out, line = run(capsys, "generate", "--model", sample / "model", "--adapter", tmp_path, "--prompt", "a")
        assert (code, out) == (1, "")
        assert line.startswith(f"error: adapter {tmp_path} cannot be read; a file of it is damaged: ")


def test_an_adapter_in_the_place_of_its_model_is_refused(sample, tmp_path, capsys, monkeypatch):
    """Loaded together, they would be exported as no whole model, and trained anew."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": "models/llava"}
    for text in (json.dumps(config), "{}"):
        (adapter / "adapter_config.json").write_text(text)
        save_settings(AttAnchorConfig(tau=TAU), adapter)
        monkeypatch.setattr(loading, "load_pretrained", None)
        data = ["--data", sample / "train.json", "--images", sample / "images"]
        for words in (
            ["generate", "--prompt", QUESTION],
            ["calibrate", *data],
            ["export-lm", "--output", tmp_path / "new"],
            ["train", *data, "--output", tmp_path / "new"],
        ):
            code, _, line = run(capsys, *words, "--model", adapter)
            assert code == 1
            assert line.startswith(f"error: model {adapter} is an adapter; give the model that it was trained on")
            assert line.endswith(", models/llava") == (text != "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    monkeypatch.undo()
    for load_any in (loading.load_pretrained, evaluation.processor_and_context):  # of probe, of experiments
        with pytest.raises(SetupError, match="is an adapter; give the model"):
            load_any(str(adapter))


def test_settings_come_from_the_nearest_place(sample, tmp_path, loaded):
    _, processor = loaded
    stored = AttAnchorConfig(tau=0.3, max_anchors=2, special_token_ids=(0,))
    folder = tmp_path / "model"
    attach(load(str(sample / "model"), tau=0.7)[0], stored).save_pretrained(folder)
    processor.save_pretrained(folder)
    assert load(str(folder))[0].attanchor_config == stored  # of config.json
    assert settings_for(str(folder)) == stored
    assert load(str(folder), default_tau=1)[0].attanchor_config == stored
    found = load(str(folder), tau=0.4)[0].attanchor_config
    assert (found.tau, found.max_anchors) == (0.4, 2)
    save_settings(AttAnchorConfig(tau=0.2), folder)  # as calibrate writes them
    found = load(str(folder))[0].attanchor_config
    assert (found.tau, found.max_anchors) == (0.2, None)
    assert found.special_token_ids == (0, 1, 2)  # of the processor
    with pytest.raises(SetupError, match="has no AttAnchor settings; give --tau"):
        load(str(sample / "model"))
    assert not hasattr(load(str(sample / "model"), need_settings=False)[0], "attanchor_config")
    assert load(str(sample / "model"), default_tau=0.9)[0].attanchor_config.tau == 0.9


def test_generate_answers_and_as_json(sample, loaded, pictures, capsys):
    arguments = ["generate", "--model", sample / "model", "--tau", TAU, "--prompt", QUESTION]
    expected = infer.answer(*loaded, QUESTION, pictures[:2])
    arguments += ["--image", pictures[0], "--image", pictures[1]]
    assert run(capsys, *arguments)[:2] == (0, f"{expected.text}\n")
    said = json.loads(run(capsys, *arguments, "--json")[1])
    assert said == {
        "prompt": QUESTION,
        "tau": TAU,
        "direction": "text_into_image",
        "answer": expected.text,
        "inserted": expected.inserted,
        "candidates": 6,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of the two"),
        (["--prompt", "a", "--input", "b"], "give one of the two"),
        (["--prompt", " "], "Invalid value for --prompt: is empty"),
        (["--prompt", "a", "--output", "b"], "Invalid value for --output: belongs to --input"),
        (["--prompt", "a", "--batch-size", "2"], "Invalid value for --batch-size: belongs to --input"),
        (["--prompt", "a", "--resume"], "Invalid value for --resume: belongs to --input"),
        (["--prompt", "a", "--skip-bad"], "Invalid value for --skip-bad: belongs to --input"),
        (["--input", "a", "--output", "b", "--image", "c"], "Invalid value for --image: belongs to --prompt"),
        (["--input", "a"], "Invalid value for --output: is missing"),
        (["--input", "a.jsonl", "--output", "./a.jsonl"], "Invalid value for --output: is the --input"),
        (["--prompt", "a", "--explain", "b.png"], "Invalid value for --explain: needs an --image"),
        (["--prompt", "a", "--image", "b", "--explain", "c.jpg"], "c.jpg should end in .png, .pdf or .svg"),
        (["--prompt", "a", "--image", "b", "--explain", "c.png", "--tau", "1"], "tau is 1, which inserts no anchors"),
        (["--prompt", "a", "--max-new-tokens", "0"], "'--max-new-tokens'"),
    ],
)
def test_options_that_do_not_go_together_are_exit_code_2(capsys, arguments, message):
    code, out, line = run(capsys, "generate", "--model", "gone", *arguments)
    assert (code, out) == (2, "")
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "gone.png"], "image gone.png cannot be read"),
        (["--image", "{sample}/train.json"], "train.json is not an image that can be read"),
        (["--adapter", "{sample}"], "holds no adapter_config.json; give the folder that train wrote to"),
        (["--prompt", "<image> what?"], "the prompt has 1 <image> placeholder for 0 images"),
        (["--tau", "nan"], "tau is NaN"),
    ],
)
def test_what_cannot_be_used_is_said_before_the_model_is_loaded(sample, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(loading, "load_pretrained", None)
    given = [word.format(sample=sample) for word in arguments]
    code, out, line = run(capsys, "generate", "--model", sample / "model", "--prompt", "a", "--tau", "0.5", *given)
    assert (code, out) == (1, "")
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "has no AttAnchor settings; give --tau"),
        (["--tau", "0.5", "--explain", "{sample}/train.json/a.png"], 1, "train.json is not a folder"),
        (["--tau", "0.5", "--explain", "{folder}"], 2, "anchors.png is a folder; give the name of a picture"),
        (["--adapter", "{sample}"], 2, "direction is image_into_text, and only text in images can be drawn"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_the_model_is_loaded(
    sample, tmp_path, capsys, monkeypatch, arguments, code, message
):
    monkeypatch.setattr(loading, "load_pretrained", None)
    (tmp_path / "adapter_config.json").write_text("{}")
    save_settings(AttAnchorConfig(tau=TAU, direction="image_into_text"), tmp_path)
    (tmp_path / "anchors.png").mkdir()
    given = [word.format(sample=sample, folder=tmp_path / "anchors.png") for word in arguments]
    if "--adapter" in given:
        given[1] = tmp_path
    image = sample / "images" / "test-00000.png"
    more = [] if "--explain" in given else ["--explain", tmp_path / "b.png"]
    found, out, line = run(
        capsys, "generate", "--model", sample / "model", "--prompt", "a", "--image", image, *given, *more
    )
    assert (found, out) == (code, "")
    assert message in line


# --- The pages. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["choose-tau", "generate-and-explain", "probe", "serve", "shorter-prompts", "threads"])
def test_the_python_of_a_page_runs_as_printed(page, sample, tmp_path, monkeypatch, capsys):
    """What it prints as commands is run by test_docs.py; the checkpoint that one of them exports is made here."""
    text = (Path(__file__).parents[3] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    (tmp_path / "sample").symlink_to(sample)
    monkeypatch.chdir(tmp_path)
    if page == "serve":
        assert cli.main(["export-lm", "--model", "sample/model", "--output", "sample-lm"]) == 0
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "probe":
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{FOLLOWS} 0.06")
    if page == "generate-and-explain":
        assert "bottom left (2 of 6 words inserted)" in capsys.readouterr().out
        assert names["boxes"] == [[0, 96, 16, 112]] * 2
        assert [answer.text for answer in names["batch"]] == ["bottom left", "red"]


def test_the_answers_of_the_page_are_those_of_the_small_model(sample, monkeypatch, capsys):
    text = (Path(__file__).parents[3] / "docs" / "generate-and-explain.md").read_text(encoding="utf-8")
    command, printed = re.search(
        r"```bash\n(attanchor [^`]*--explain anchors.png\n)```\n\n```text\n(.*?)```", text, re.DOTALL
    ).groups()
    monkeypatch.chdir(sample.parent)
    assert cli.main(shlex.split(command.replace("\\\n", ""))[1:]) == 0
    assert capsys.readouterr().out == printed
