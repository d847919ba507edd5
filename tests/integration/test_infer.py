"""`attanchor generate` and its Python: one question, and files of them that go on after a kill."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attanchor_vlm import AttAnchorConfig, attach, cli, encode_chat, infer, loading, questions, save_settings
from attanchor_vlm.data import DataError
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.sample import write_sample

TAU = 0.5
QUESTION = "Where is the orange ring?"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infer") / "sample"
    write_sample(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(sample):
    return infer.load(str(sample / "model"), tau=TAU)


@pytest.fixture(scope="module")
def pictures(sample):
    return sorted((sample / "images").glob("test-*.png"))


def run(capsys, *arguments):
    """Exit code, stdout and the last line of stderr."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, (said.err.strip().splitlines() or [""])[-1]


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
    plain, _ = infer.load(str(loaded[0].config._name_or_path), tau=1)
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

    model, _ = loading.load(str(sample / "model"))
    model.config.text_config.intermediate_size *= 2
    wider = type(model)(model.config)
    wrapped = get_peft_model(wider, LoraConfig(r=2, target_modules=loading.LORA_TARGETS))
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
        monkeypatch.setattr(loading, "load", None)
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
    for load in (loading.load, evaluation.processor_and_context):  # of probe, of experiments
        with pytest.raises(loading.SetupError, match="is an adapter; give the model"):
            load(str(adapter))


def test_settings_come_from_the_nearest_place(sample, tmp_path, loaded):
    _, processor = loaded
    stored = AttAnchorConfig(tau=0.3, max_anchors=2, special_token_ids=(0,))
    folder = tmp_path / "model"
    attach(infer.load(str(sample / "model"), tau=0.7)[0], stored).save_pretrained(folder)
    processor.save_pretrained(folder)
    assert infer.load(str(folder))[0].attanchor_config == stored  # of config.json
    assert infer.settings_for(str(folder)) == stored
    assert infer.load(str(folder), default_tau=1)[0].attanchor_config == stored
    found = infer.load(str(folder), tau=0.4)[0].attanchor_config
    assert (found.tau, found.max_anchors) == (0.4, 2)
    save_settings(AttAnchorConfig(tau=0.2), folder)  # as calibrate writes them
    found = infer.load(str(folder))[0].attanchor_config
    assert (found.tau, found.max_anchors) == (0.2, None)
    assert found.special_token_ids == (0, 1, 2)  # of the processor
    with pytest.raises(loading.SetupError, match="has no AttAnchor settings; give --tau"):
        infer.load(str(sample / "model"))
    assert not hasattr(infer.load(str(sample / "model"), need_settings=False)[0], "attanchor_config")
    assert infer.load(str(sample / "model"), default_tau=0.9)[0].attanchor_config.tau == 0.9


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
    monkeypatch.setattr(loading, "load", None)
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
    monkeypatch.setattr(loading, "load", None)
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


# --- A file of questions. --------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(sample, tmp_path):
    """Seven rows of every form, in a folder of their own beside the images."""
    name = os.path.relpath(sample / "images", tmp_path)
    rows = [
        {"id": "a", "image": f"{name}/test-00000.png", "prompt": QUESTION},
        {"id": 7, "images": [f"{name}/test-00001.png"], "prompt": "Is there a red ring in the picture?"},
        {"id": "text", "prompt": "Where is it?"},
        {"image": f"{name}/test-00002.png", "prompt": "<image>\nWhat colour is the disc?"},
        {"id": "two", "image": [f"{name}/test-00003.png", f"{name}/test-00004.png"], "prompt": "And in both, \u2028?"},
        {
            "id": "turns",
            "image": f"{name}/test-00005.png",
            "conversations": [{"from": "human", "value": "<image>\nHi"}],
        },
        {"id": "last", "image": f"{name}/test-00006.png", "prompt": "Is there a blue star in the picture?"},
    ]
    rows[4] = json.dumps(rows[4], ensure_ascii=False)  # a line separator inside of a row
    return write(tmp_path / "asked.jsonl", rows)


def command(sample, asked, output, *more):
    options = {"--model": sample / "model", "--tau": TAU, "--input": asked, "--output": output, "--max-new-tokens": 6}
    return ["generate", *(word for pair in options.items() for word in pair), *more]


def test_a_file_is_answered_row_by_row(sample, asked, tmp_path, loaded, capsys):
    output = tmp_path / "new" / "answers.jsonl"
    code, out, _ = run(capsys, *command(sample, asked, output, "--batch-size", 2))
    assert (code, out) == (0, f"7 answers: {output}\n")
    rows = read(output)
    assert [row["id"] for row in rows] == ["a", 7, "text", 4, "two", "turns", "last"]
    for row, one in zip(rows, questions.read_questions(asked)[0], strict=True):
        alone = infer.answer(*loaded, one.prompt, one.images, max_new_tokens=6)
        assert (row["answer"], row["inserted"], row["candidates"]) == alone
        made_with = {"model": str(sample / "model"), "adapter": None, "tau": TAU, "max_new_tokens": 6}
        made_with |= {"content_words": False, "function_words": None, "dtype": "float32"}
        assert {name: row[name] for name in made_with} == made_with
    assert rows[2]["inserted"] == 0 < rows[0]["inserted"]


def test_training_rows_are_asked_their_first_question(sample, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    more = ["--images", sample / "images", "--json", "--batch-size", 32]
    code, out, _ = run(capsys, *command(sample, sample / "test.json", output, *more))
    truth = [row["conversations"][1]["value"] for row in json.loads((sample / "test.json").read_text())]
    assert (code, json.loads(out)["answered"]) == (0, len(truth))
    right = sum(row["answer"] == said for row, said in zip(read(output), truth, strict=True))
    assert right > 0.6 * len(truth)  # the small model knows most of them


BAD = [
    ("{not json", "not valid JSON (Expecting property name"),
    ([1], "the row is a list; it should be an object"),
    ({"prompt": " "}, '"prompt" is missing or empty'),
    ({"id": 1.5, "prompt": "a"}, '"id" is 1.5; it should be text or a whole number'),
    ({"id": "\ud83d", "prompt": "a"}, "\"id\" holds half a character, '\\ud83d', at 0"),
    ({"prompt": "a \ud83d"}, "the prompt holds half a character, '\\ud83d', at 2"),
    ({"id": "a", "prompt": "a"}, "its id 'a' is that of row 1 too"),
    ({"image": 3, "prompt": "a"}, '"image" is 3'),
    ({"image": "gone.png", "prompt": "a"}, "gone.png does not exist"),
    ({"image": "asked.jsonl", "prompt": "a"}, "asked.jsonl is not an image that can be read"),
    ({"image": ["asked.jsonl"] * 2, "prompt": "<image> a"}, "1 <image> placeholder for 2 images"),
    ({"prompt": "a " * 2000}, "more than the model's context, 1024"),
]


@pytest.mark.parametrize(("row", "reason"), BAD[:-1], ids=[reason for _, reason in BAD[:-1]])
def test_a_bad_row_is_an_error_before_anything_starts(sample, asked, tmp_path, capsys, monkeypatch, row, reason):
    monkeypatch.setattr(loading, "load", None)
    write(asked, [*asked.read_text().split("\n")[:-1], "", row])
    assert cli.main([str(word) for word in command(sample, asked, tmp_path / "answers.jsonl")]) == 1
    error = capsys.readouterr().err
    assert f"error: {asked}, row 9: " in error
    assert reason in error
    assert error.strip().splitlines()[-1] == "1 of 8 rows are bad: mend them, or leave them out with --skip-bad"
    assert not (tmp_path / "answers.jsonl").exists()


def test_bad_rows_may_be_left_out(sample, asked, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    write(asked, [*asked.read_text().split("\n")[:-1], *(row for row, _ in BAD)])
    assert cli.main([str(word) for word in command(sample, asked, output, "--skip-bad", "--json")]) == 0
    said = capsys.readouterr()
    left_out = json.loads(said.out)["left_out"]
    assert [one["row"] for one in left_out] == list(range(8, 20))
    for one, (_, reason) in zip(left_out, BAD, strict=True):
        assert reason in one["reason"]
        assert f"left out: {asked}, row {one['row']}: {one['reason']}" in said.err
    assert len(read(output)) == 7
    # One that only the model's context forbids stops a run too, without --skip-bad.
    write(asked, [BAD[-1][0]])
    assert run(capsys, *command(sample, asked, tmp_path / "b.jsonl"))[0] == 1


KILLED = """
import os, signal, sys
from attanchor_vlm import cli, questions
answers, calls = questions.answers, []
def killed(*args, **kwargs):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return answers(*args, **kwargs)
questions.answers = killed
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(sample, asked, tmp_path, capsys):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(capsys, *command(sample, asked, whole, "--batch-size", 2))[0] == 0
    arguments = [str(word) for word in command(sample, asked, cut, "--batch-size", 2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    # Two batches were on disk: two rows, and the one without an image. A third may have been half written.
    assert cut.read_text().splitlines() == whole.read_text().splitlines()[:3]
    with cut.open("a") as file:
        file.write(whole.read_text().splitlines()[3][:40])

    code, out, line = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert line == f"error: output {cut} exists; go on with it by --resume, or give another name"
    code, out, _ = run(capsys, *arguments, "--resume")
    assert (code, out) == (0, f"4 answers, 3 from before: {cut}\n")
    assert cut.read_text() == whole.read_text()
    code, out, _ = run(capsys, *arguments, "--resume")  # nothing left to do
    assert out == f"0 answers, 7 from before: {cut}\n"
    assert cut.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "a"}', "row 2: not an answer as this command writes it"),
        ("thesis", "row 2: not an answer as this command writes it"),
        ("[1]", "row 2: not an answer as this command writes it"),
        ('{"id": "b", "answer": "x", "tau": 0.5}', "row 2: answers 'b', which is not among the questions"),
        ('{"id": "a", "answer": "x", "tau": 0.4}', "row 2: was made with tau 0.4, not 0.5; give the same settings"),
    ],
)
def test_only_answers_to_these_questions_are_gone_on_with(tmp_path, line, reason):
    output = tmp_path / "answers.jsonl"
    before = f'{{"id": 7, "answer": "x", "tau": 0.5}}\n{line}\n{{"half'
    output.write_text(before)
    with pytest.raises(DataError, match=reason):
        questions.open_answers(output, ["a", 7], {"tau": 0.5}, resume=True)
    assert output.read_text() == before
    output.write_text(before.replace(f"{line}\n", ""))
    assert questions.open_answers(output, ["a", 7], {"tau": 0.5}, resume=True) == {7}
    assert output.read_text() == before.partition(line)[0]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--content-words"], "was made with content_words False, not True"),
        (["--function-words", "{words}"], "was made with function_words None, not '{words}'"),
    ],
)
def test_answers_with_other_words_are_not_gone_on_with(sample, asked, tmp_path, capsys, more, reason):
    output, words = tmp_path / "answers.jsonl", tmp_path / "words.txt"
    words.write_text("where")
    assert run(capsys, *command(sample, asked, output))[0] == 0
    more = [word.format(words=words) for word in more]
    code, _, line = run(capsys, *command(sample, asked, output, "--resume", *more))
    assert code == 1
    assert reason.format(words=words) in line


def test_a_first_question_has_its_own_images_alone(sample, tmp_path):
    turns = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "a"}]
    turns += [{"from": "human", "value": "<image> And here?"}, {"from": "gpt", "value": "b"}]
    names = ["test-00000.png", "test-00001.png"]
    rows = [{"image": names, "conversations": turns}, {"images": None, "image": names[1], "prompt": "What?"}]
    later = [{**turns[0], "value": "Hello?"}, *turns[1:]]
    rows += [{"image": names[0], "conversations": later}, {"image": names[0], "conversations": later[:1]}]
    text = "\ufeff" + "".join(f"{json.dumps(row)}\r\n" for row in rows)  # as an editor under Windows saves it
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    first, second, text_alone, unplaced = questions.read_questions(tmp_path / "rows.jsonl", sample / "images")[0]
    assert [path.name for path in first.images] == names[:1]
    assert [path.name for path in second.images] == names[1:]
    assert second.prompt == "<image>\nWhat?"
    assert (text_alone.prompt, text_alone.images) == ("Hello?", ())
    assert (unplaced.prompt, len(unplaced.images)) == ("<image>\nHello?", 1)


def test_repeated_ids_of_training_rows_get_their_numbers(tmp_path):
    turns = [{"from": "human", "value": "What?"}]
    rows = [{"id": name, "conversations": turns} for name in ("a", "a", "b", "a")]
    read = questions.read_questions(write(tmp_path / "rows.jsonl", rows))[0]
    assert [one.id for one in read] == ["a", "a#2", "b", "a#4"]


def test_an_output_that_cannot_be_written_is_an_error_before_anything_starts(sample, asked, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load", None)
    code, _, line = run(capsys, *command(sample, asked, asked / "answers.jsonl"))
    assert (code, line) == (1, f"error: {asked / 'answers.jsonl'} cannot be written: {asked} is not a folder")
    assert cli.main(["export-lm", "--model", str(sample / "model"), "--output", str(asked / "lm")]) == 1
    assert capsys.readouterr().err == f"error: {asked / 'lm'} cannot be written: {asked} is not a folder\n"


def test_a_full_disk_is_one_error_and_loses_nothing(loaded, asked, tmp_path):
    output, rows = tmp_path / "answers.jsonl", questions.read_questions(asked)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(DataError, match=r"answers.jsonl cannot be written: .* too large; what it holds is kept"):
            questions.answer_all(*loaded, rows, output, {"tau": TAU}, batch_size=1, max_new_tokens=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = output.read_text().count("\n")
    assert 0 < kept < 7
    result = questions.answer_all(*loaded, rows, output, {"tau": TAU}, batch_size=1, max_new_tokens=6, resume=True)
    assert (result.answered, result.earlier) == (7 - kept, kept)
    assert [row["id"] for row in read(output)] == [one.id for one in rows]


def test_a_batch_that_does_not_fit_says_what_to_do(loaded, asked, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(questions, "answers", full)
    rows = questions.read_questions(asked)[0]
    with pytest.raises(
        DataError, match="does not hold a batch of 2 questions; give a smaller --batch-size, and --resum"
    ):
        questions.answer_all(*loaded, rows, tmp_path / "answers.jsonl", {}, batch_size=8)


def test_a_prompt_that_grows_past_the_context_names_its_rows(sample, tmp_path):
    model, processor = infer.load(str(sample / "model"), tau=-1)
    name = os.path.relpath(sample / "images", tmp_path)
    row = {"image": f"{name}/test-00000.png", "prompt": "red ring " * 400}
    rows = questions.read_questions(write(tmp_path / "long.jsonl", [row]))[0]
    rows, _ = questions.check_for_model(tmp_path / "long.jsonl", rows, model, processor)
    with pytest.raises(DataError, match=r"no answer to rows 1: the prompt with its anchors has \d+ tokens"):
        questions.answer_all(model, processor, rows, tmp_path / "answers.jsonl", {})


# --- The pages. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["choose-tau", "generate-and-explain", "serve"])
def test_the_python_of_a_page_runs_as_printed(page, sample, tmp_path, monkeypatch, capsys):
    """What it prints as commands is run by test_docs.py; the checkpoint that one of them exports is made here."""
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    (tmp_path / "sample").symlink_to(sample)
    monkeypatch.chdir(tmp_path)
    if page == "serve":
        assert cli.main(["export-lm", "--model", "sample/model", "--output", "sample-lm"]) == 0
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "generate-and-explain":
        assert "top left (2 of 6 words inserted)" in capsys.readouterr().out
        assert names["boxes"] == [[32, 48, 48, 64]] * 2
        assert [answer.text for answer in names["batch"]] == ["top left", "orange"]


def test_the_answers_of_the_page_are_those_of_the_small_model(sample, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "generate-and-explain.md").read_text(encoding="utf-8")
    command, printed = re.search(
        r"```bash\n(attanchor [^`]*--explain anchors.png\n)```\n\n```text\n(.*?)```", text, re.DOTALL
    ).groups()
    monkeypatch.chdir(sample.parent)
    assert cli.main(shlex.split(command.replace("\\\n", ""))[1:]) == 0
    assert capsys.readouterr().out == printed
