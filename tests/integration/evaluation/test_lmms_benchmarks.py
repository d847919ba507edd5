"""The nine benchmarks: lmms-eval's own tasks on a few rows in the form of their data sets, figures by hand."""

from __future__ import annotations

import json

import pytest
from lmms_toy import existence
from PIL import Image

from attanchor_vlm import cli
from attanchor_vlm.errors import DataError
from attanchor_vlm.evaluation import benchmarks
from attanchor_vlm.inference import ask as infer
from attanchor_vlm.model.load import load
from attanchor_vlm.training import run as train


def vqa_answers(**counts):
    texts = [text for text, count in counts.items() for _ in range(count)]
    assert len(texts) == 10
    return texts


def mmbench(index, answer):
    row = {"index": index, "question": "What is it?", "hint": "nan", "answer": answer, "source": "s", "split": "dev"}
    options = {"A": "a cat", "B": "a dog", "C": "nan", "D": "nan"}
    return {**row, **options, "category": "object", "L2-category": "perception"}


def hallusion(figure, question, truth):
    row = {"category": "VD", "subcategory": "figure", "set_id": "0", "figure_id": figure}
    return {**row, "question_id": question, "question": "Is it so?", "gt_answer": truth, "gt_answer_details": "It is."}


def mme(category, image, truth):
    return {"question_id": image, "category": category, "question": "Is it? Please answer yes or no.", "answer": truth}


# For each benchmark: split, rows, answers of the model, and what comes out.
#   VQAv2, VizWiz: an answer given by n of 10 people counts min(1, k / 3), k of the other nine, on average over all.
#     3 of 10: (3 * 2/3 + 7 * 1) / 10 = 0.9; 2 of 10: (2 * 1/3 + 8 * 2/3) / 10 = 0.6; articles and case do not matter.
#   MME: per image the accuracy of its two questions plus 100 if both are right; mean per category, sum over categories:
#     existence (200 + 50) / 2 = 125, code reasoning 50.
#   POPE: 3 of 4 right; "yes" said twice, once rightly, of one that was to be affirmed: precision 1/2, recall 1.
#   HallusionBench: 3 of 4 right; both answers to question 0 right, of question 1 one; of figure 0 both, of 1 one.
CASES = {
    "vqav2": (
        "validation",
        [
            {"question_id": 1, "question": "What colour?", "answers": vqa_answers(red=3, blue=7), "answer": "blue"},
            {"question_id": 2, "question": "What is it?", "answers": vqa_answers(dog=10), "answer": "dog"},
        ],
        ["red", "A dog."],
        {"vqav2": 95.0},
    ),
    "scienceqa": (
        "test",
        [{"hint": "", "question": "Which?", "choices": ["cat", "dog"], "answer": 1}] * 4,
        ["B", "A. cat", "B. dog", "dog"],
        {"scienceqa": 50.0},
    ),
    "gqa": (
        "testdev",
        [{"id": str(i), "imageId": "n1", "question": "Is it?", "answer": "yes"} for i in range(4)],
        ["Yes.", "no", "yes it is", "yes"],
        {"gqa": 50.0},
    ),
    "vizwiz": (
        "val",
        [{"question_id": "v1", "question": "what is this", "answers": vqa_answers(unanswerable=2, can=8)}],
        ["Unanswerable"],
        {"vizwiz": 60.0},
    ),
    "mmbench": ("dev", [mmbench(1, "A"), mmbench(2, "A"), mmbench(3, "B"), mmbench(4, "B")], ["A", "B", "B.", "a dog"],
                {"mmbench": 75.0}),
    "mme": (
        "test",
        [mme("existence", "a", "Yes"), mme("existence", "a", "No"), mme("existence", "b", "Yes"),
         mme("existence", "b", "No"), mme("code_reasoning", "c", "Yes"), mme("code_reasoning", "c", "No")],
        ["Yes", "no.", "yes", "Yes", "yes", "Yes"],
        {"mme": 175.0, "mme_perception": 125.0},
    ),
    "pope": (
        "test",
        [{"question_id": str(i), "question": "Is there a dog?", "answer": truth, "category": "random"}
         for i, truth in enumerate(["yes", "no", "no", "no"])],
        ["yes", "No", "Yes", "no"],
        {"pope": 75.0, "pope_f1": 100 * 2 * 0.5 * 1 / 1.5},
    ),
    "amber": (
        None,
        [("yes", "discriminative-attribute-state"), ("no", "discriminative-hallucination"),
         ("no", "discriminative-relation"), ("yes", "discriminative-hallucination")],
        ["Yes", "no", "Yes, it is.", "No."],
        {"amber": 50.0, "amber_accuracy": 50.0, "amber_precision": 50.0, "amber_recall": 50.0},
    ),
    "hallusionbench": (
        "image",
        [hallusion("0", "0", "1"), hallusion("0", "1", "0"), hallusion("1", "0", "1"), hallusion("1", "1", "0")],
        ["Yes.", "No, it is not.", "yes", "Yes"],
        {"hallusionbench": 75.0, "hallusionbench_question_pairs": 50.0, "hallusionbench_figures": 50.0},
    ),
}  # fmt: skip


GQA_README = """---
configs:
- config_name: testdev_balanced_instructions
  data_files: [{split: testdev, path: questions.parquet}]
- config_name: testdev_balanced_images
  data_files: [{split: testdev, path: images.parquet}]
---
"""


def write_task(name, folder):
    split, rows, _, _ = CASES[name]
    picture = Image.new("RGB", (8, 8), "red")
    if name == "amber":
        (folder / "data" / "query").mkdir(parents=True)
        (folder / "image").mkdir()
        picture.save(folder / "image" / "AMBER_1.jpg")
        query = [{"id": i, "image": "AMBER_1.jpg", "query": "Is it?"} for i in range(1005, 1005 + len(rows))]
        (folder / "data" / "query" / "query_discriminative.json").write_text(json.dumps(query))
        truths = [{"id": 1005 + i, "type": kind, "truth": truth} for i, (truth, kind) in enumerate(rows)]
        (folder / "data" / "annotations.json").write_text(json.dumps(truths))
        return folder
    import datasets

    rows = [{**row, "image": picture} for row in rows]
    if name == "vqav2":
        for row in rows:
            row["answers"] = [{"answer": text, "answer_id": i} for i, text in enumerate(row["answers"])]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    folder.mkdir()
    if name == "gqa":  # as a clone of the Hub's repository, which keeps questions and images apart
        (folder / "README.md").write_text(GQA_README)
        table.remove_columns("image").to_parquet(folder / "questions.parquet")
        datasets.Dataset.from_list([{"id": "n1", "image": picture}]).to_parquet(folder / "images.parquet")
    elif name == "pope":
        datasets.DatasetDict({split: table}).save_to_disk(str(folder))
    else:
        table.to_parquet(folder / f"{split}.parquet")
    return folder


def write_pope(folder, asked):
    """Questions about scenes in the form of POPE's rows."""
    import datasets

    rows = [
        {"question_id": str(i), "question": text, "answer": truth, "category": "random", "image": str(file)}
        for i, (text, truth, file) in enumerate(asked)
    ]
    folder.mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def scripted():
    """A model for lmms-eval that gives the answers of `CASES`."""
    from lmms_eval.api.model import lmms

    task_of = {benchmark.task: name for name, benchmark in benchmarks.BENCHMARKS.items()}

    class Scripted(lmms):
        is_simple = False
        done = False

        def generate_until(self, requests):
            said = []
            for request in requests:
                _, messages, _, doc_id, task, split = request.args
                chat = messages(self.task_dict[task][split][doc_id])
                assert [part["type"] for part in chat[0]["content"]] == ["image", "text"]
                said.append(CASES[task_of[task]][2][doc_id])
            self.done = True
            return said

        loglikelihood = generate_until_multi_round = generate_until

    return Scripted()


def test_the_nine_benchmarks_by_hand(lmms_eval, tmp_path, monkeypatch):
    import datasets

    from attanchor_vlm.evaluation import harness

    assert set(CASES) == set(benchmarks.BENCHMARKS)
    model, decode, decoded_again = scripted(), datasets.Image.decode_example, []

    def counting(self, *arguments, **options):
        if model.done:
            decoded_again.append(1)
        return decode(self, *arguments, **options)

    data = {name: write_task(name, tmp_path / name) for name in CASES}
    monkeypatch.setattr(datasets.Image, "decode_example", counting)
    found = harness.run_tasks(model, list(CASES), data)
    assert found == pytest.approx({key: value for *_, values in CASES.values() for key, value in values.items()})
    assert not decoded_again  # answers are scored without their images


def test_a_limit_that_gives_half_of_mme_gives_no_sum(lmms_eval, tmp_path):
    from attanchor_vlm.evaluation import harness

    data = {"mme": write_task("mme", tmp_path / "mme")}
    assert harness.run_tasks(scripted(), ["mme"], data, limit=2) == {"mme_perception": 200.0}


def test_eval_runs_benchmarks_with_the_small_model(lmms_eval, world, tmp_path, capsys):
    asked = existence(world)
    folder = write_pope(tmp_path / "pope", asked)
    command = ["eval", "--model", world / "model", "--tau", "0.3", "--tasks", "pope", "--task-data", f"pope={folder}"]
    assert cli.main([str(word) for word in [*command, "--json", "--batch-size", "3"]]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["values"]) == {"pope", "pope_f1"}
    model, processor = load(str(world / "model"), tau=0.3)
    prompt = "{}\nAnswer the question using a single word or phrase."
    right = [
        infer.answer(model, processor, prompt.format(text), [file], max_new_tokens=128).text.lower() == truth
        for text, truth, file in asked
    ]
    assert printed["values"]["pope"] == pytest.approx(100 * sum(right) / len(right))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "poppe"], "task is 'poppe'; it should be one of vqav2, scienceqa"),
        (["--tasks", "pope", "--task-data", "mme=."], "task data is given for mme, which is not among the tasks"),
        (["--tasks", "pope", "--task-data", "pope=gone"], "task data gone for pope is not a folder"),
        (["--tasks", "amber"], "task amber needs its data"),
        (["--tasks", "pope", "--task-data", "pope"], "should be NAME=DIR"),
        (["--tasks", "pope", "--include-path", "gone"], "include path gone is not a folder"),
        (["--tasks", "mme", "--limit", "5"], "limit is 5; with task mme it should be even"),
    ],
)
def test_tasks_that_cannot_run_are_refused_before_a_model_is_loaded(lmms_eval, capsys, arguments, message):
    assert cli.main(["eval", "--model", "./gone", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_data_that_are_not_here_are_said_in_one_line(lmms_eval, world, hub_out_of_reach, monkeypatch, capsys, tmp_path):
    """A Hub that cannot be reached; offline, without the Hub's cache; rows of another split."""
    command = ["eval", "--model", str(world / "model"), "--tasks", "mme"]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    download = pytest.importorskip("lmms_eval.api.task").ConfigurableTask.download
    monkeypatch.setattr(download.retry, "sleep", lambda seconds: None)  # between its five attempts
    assert cli.main(command) == 1
    assert "cannot be reached (no route); give --task-data mme=DIR" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(command) == 1
    assert "error: the data of task mme cannot be loaded: " in capsys.readouterr().err

    folder = write_task("pope", tmp_path / "pope")
    assert cli.main([*command[:4], "mmbench", "--task-data", f"mmbench={folder}"]) == 1
    assert "the data of task mmbench cannot be loaded: 'dev'" in capsys.readouterr().err


def test_an_experiment_measures_benchmarks(lmms_eval, world, tmp_path):
    """Small model, no training, two arms, POPE from a local folder: values in rows and table."""
    write_pope(tmp_path / "pope", existence(world)[:4])
    output = tmp_path / "out"
    options = ["--model", world / "model", "--images", world / "images", "--output", output, "--no-train"]
    options += ["--preset", "small-llava", "--metrics", "none", "--tasks", "pope", "--taus", "1,0.3"]
    command = ["experiment", "sweep", *options, "--task-data", f"pope={tmp_path / 'pope'}"]
    assert cli.main([str(word) for word in command]) == 0
    found = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    assert [set(one["values"]) for one in found] == [{"pope", "pope_f1"}] * 2
    values = [f"{one['values']['pope']:.2f}" for one in found]
    assert f"| POPE | {values[0]} | {values[1]} |" in (output / "table.md").read_text()


def test_task_data_that_cannot_be_loaded_are_said_before_training(lmms_eval, world, tmp_path, monkeypatch, capsys):
    def run(*_):
        raise AssertionError("trained before the data were looked at")

    monkeypatch.setattr(train, "run", run)
    folder = write_task("pope", tmp_path / "pope")  # mmbench has no such split
    options = ["--model", world / "model", "--images", world / "images", "--output", tmp_path / "out", "--metrics"]
    options += ["none", "--data", world / "test.json", "--preset", "small-llava", "--tasks", "mmbench"]
    command = ["experiment", "sweep", *options, "--taus", "1", "--task-data", f"mmbench={folder}"]
    assert cli.main([str(word) for word in command]) == 1
    assert "the data of task mmbench cannot be loaded: 'dev'" in capsys.readouterr().err


def test_ambers_folder_is_checked(tmp_path):
    folder = write_task("amber", tmp_path / "amber")
    assert len(benchmarks.amber.questions(folder)) == 4
    (folder / "image" / "AMBER_1.jpg").unlink()
    with pytest.raises(DataError, match=r"AMBER_1\.jpg does not exist"):
        benchmarks.amber.questions(folder)
    (folder / "data" / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"annotations\.json cannot be read"):
        benchmarks.amber.questions(folder)
