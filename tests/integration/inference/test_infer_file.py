"""`attanchor generate` over a file of questions, which goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import forked
import pytest
import torch
from infer_toy import QUESTION, TAU, run

from attanchor_vlm import cli, detach
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.inference import ask as infer
from attanchor_vlm.inference import ask_file as questions
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.load import load


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
        made_with |= {"keep": None, "keep_by": None}
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
    monkeypatch.setattr(loading, "load_pretrained", None)
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
from attanchor_vlm import cli
from attanchor_vlm.inference import ask_file as questions
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
    assert questions.open_answers(output, ["a", 7], {"tau": 0.5, "keep": None}, resume=True) == {7}
    assert output.read_text() == before.partition(line)[0]


def test_answers_with_other_settings_are_not_gone_on_with(sample, asked, tmp_path, capsys):
    output, words = tmp_path / "answers.jsonl", tmp_path / "words.txt"
    words.write_text("where")
    assert run(capsys, *command(sample, asked, output))[0] == 0
    for more, reason in (
        (["--keep", 0.5], "keep None, not 0.5"),
        (["--content-words"], "content_words False, not True"),
        (["--function-words", words], f"function_words None, not '{words}'"),
    ):
        code, _, line = run(capsys, *command(sample, asked, output, "--resume", *more))
        assert (code, f"was made with {reason}" in line) == (1, True)


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
    monkeypatch.setattr(loading, "load_pretrained", None)
    code, _, line = run(capsys, *command(sample, asked, asked / "answers.jsonl"))
    assert (code, line) == (1, f"error: {asked / 'answers.jsonl'} cannot be written: {asked} is not a folder")
    assert cli.main(["export-lm", "--model", str(sample / "model"), "--output", str(asked / "lm")]) == 1
    assert capsys.readouterr().err == f"error: {asked / 'lm'} cannot be written: {asked} is not a folder\n"


def test_an_output_that_another_run_writes_to_is_refused(loaded, sample, asked, tmp_path, capsys, monkeypatch):
    output, rows = tmp_path / "answers.jsonl", questions.read_questions(asked)[0]
    with forked.held(tmp_path, output.name) as other:
        with pytest.raises(SetupError, match=f"answers.jsonl is in use by process {other} on .*; wait for it, or take"):
            questions.answer_all(*loaded, rows, output, {"tau": TAU}, resume=True)
        monkeypatch.setattr(loading, "load_pretrained", None)
        code, _, line = run(capsys, *command(sample, asked, output, "--resume"))
        assert (code, "is in use by process" in line) == (1, True)
        assert not output.exists()
    rows = rows[:1]
    assert questions.answer_all(*loaded, rows, output, {"tau": TAU}, max_new_tokens=1).answered == 1
    assert "which is gone: it is taken over" in capsys.readouterr().err


def test_a_full_disk_is_one_error_and_loses_nothing(loaded, asked, tmp_path):
    output, rows = tmp_path / "answers.jsonl", questions.read_questions(asked)[0]
    said = r"answers.jsonl cannot be written: .* too large; what it holds is kept"
    with forked.at_most(200), pytest.raises(DataError, match=said):
        questions.answer_all(*loaded, rows, output, {"tau": TAU}, batch_size=1, max_new_tokens=6)
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
    model, processor = load(str(sample / "model"), tau=-1)
    name = os.path.relpath(sample / "images", tmp_path)
    row = {"image": f"{name}/test-00000.png", "prompt": "red ring " * 400}
    rows = questions.read_questions(write(tmp_path / "long.jsonl", [row]))[0]
    rows, _ = questions.check_for_model(tmp_path / "long.jsonl", rows, model, processor)
    with pytest.raises(DataError, match=r"no answer to rows 1: the prompt with its anchors has \d+ tokens"):
        questions.answer_all(model, processor, rows, tmp_path / "answers.jsonl", {})
    # Left out, the others are answered: those of its own batch, and what comes behind.
    several = [{**row, "prompt": "red"}, row, {**row, "prompt": "ring"}, {**row, "prompt": "blue"}]
    rows = questions.read_questions(write(tmp_path / "several.jsonl", several))[0]
    output = tmp_path / "several-answers.jsonl"
    result = questions.answer_all(model, processor, rows, output, {}, batch_size=2, skip_bad=True)
    assert (result.answered, list(result.left_out)) == (3, [2])
    assert "the prompt with its anchors has" in result.left_out[2]
    assert [one["id"] for one in read(output)] == [1, 3, 4]


def test_a_prompt_that_only_dropping_makes_short_enough_is_answered(sample, tmp_path):
    model, processor = load(str(sample / "model"), tau=1, keep=4)
    name = os.path.relpath(sample / "images", tmp_path)
    words = 1024 - 30 - len(processor.tokenizer("ring", add_special_tokens=False).input_ids)
    row = {"image": f"{name}/test-00000.png", "prompt": "ring " * words}
    file = write(tmp_path / "long.jsonl", [row])
    rows, bad = questions.check_for_model(file, questions.read_questions(file)[0], model, processor)
    assert bad == []
    assert questions.answer_all(model, processor, rows, tmp_path / "a.jsonl", {}, max_new_tokens=1).answered == 1
    detach(model)
    with pytest.raises(DataError, match="more than the model's context, 1024"):
        questions.check_for_model(file, rows, model, processor)
