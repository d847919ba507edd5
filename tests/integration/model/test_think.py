"""Think mode of Algorithm 2: pause tokens in front of the answer, on both routes."""

from __future__ import annotations

import pytest
import torch
from test_leaks import two_turns
from tiny import CHATML, byte_level_tokenizer, difference, llava_processor, prompts, tiny_llava, with_labels
from training_toy import save_random_model

from attanchor_lab.scenes import dataset as scenes
from attanchor_vlm import AttAnchorConfig, attach, cli, load_settings, prepare_inputs
from attanchor_vlm.model.pauses import with_pauses

TAU, NEW, PAUSES, PAUSE = 0.1, 4, 3, 63
MIXED = [1, 2, 0]
ROUTES = ["embeds", "ids"]
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def attached(route: str = "embeds", **settings):
    given = {"tau": TAU, "direction": "image_into_text", "pause_tokens": PAUSES, "pause_token_id": PAUSE, **settings}
    return attach(tiny_llava(), AttAnchorConfig(route=route, **given))


def without_pauses(batch: dict) -> dict:
    """A batch in which the pause token stands nowhere else."""
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == PAUSE, PAUSE - 1)}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pauses_stand_at_the_end_of_the_prompt_and_in_front_of_the_answer(side, labelled, route):
    batch = without_pauses(prompts(MIXED, side))
    batch = with_labels(batch, 2) if labelled else batch
    model, bare = attached(route), attached(route, pause_tokens=0)
    with torch.no_grad():
        model(**batch), bare(**batch)
    plan, expected = model.attanchor_plan, bare.attanchor_plan
    assert expected.is_anchor.any()
    assert torch.equal(plan.host, expected.host)
    assert torch.equal(plan.score, expected.score)
    for row in range(len(MIXED)):
        real, own = plan.attention_mask[row].bool(), expected.attention_mask[row].bool()
        source, ids = plan.source[row][real].tolist(), plan.input_ids[row][real].tolist()
        before = expected.source[row][own].tolist()
        learned = expected.labels[row][own] != -100 if labelled else torch.zeros(len(before), dtype=torch.bool)
        end = int(learned.int().argmax()) if labelled else len(before)
        count = PAUSES if MIXED[row] else 0
        assert source == before[:end] + [-1] * count + before[end:]
        assert ids[end : end + count] == [PAUSE] * count
        assert PAUSE not in ids[:end] + ids[end + count :]
        assert plan.position_ids[row][real].tolist() == list(range(len(source)))
        if labelled:
            assert plan.labels[row][real].tolist() == (
                expected.labels[row][own][:end].tolist() + [-100] * count + batch["labels"][row][before[end:]].tolist()
            )
    if labelled:
        assert (plan.labels[(plan.source < 0)] == -100).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_both_routes_agree(side):
    batch, outputs = with_labels(prompts(MIXED, side), 2), []
    for route in ROUTES:
        model = attached(route)
        output = model(**batch)
        output.loss.backward()
        real = model.attanchor_plan.attention_mask.bool()
        outputs.append((output.logits[real], output.loss, model.get_input_embeddings().weight.grad[PAUSE]))
    for embeds, ids in zip(*outputs, strict=True):
        assert difference(embeds, ids) < 1e-5
    assert outputs[0][2].abs().max() > 1e-6  # the answer attends to the pauses


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_samples_alone(side, route):
    model, batch = attached(route), prompts(MIXED, side)
    pictures = list(batch["pixel_values"].split([1, 2]))
    with torch.no_grad():
        together, plan = model(**batch).logits, None
        plan = model.attanchor_plan
        generated = model.generate(**batch, **GREEDY)[:, -NEW:]
        for row, count in enumerate(MIXED):
            real = batch["attention_mask"][row].bool()
            alone = {"input_ids": batch["input_ids"][row : row + 1, real]}
            if count:
                alone |= {"anchor_mask": batch["anchor_mask"][row : row + 1, real], "pixel_values": pictures[row]}
            assert difference(together[row][plan.attention_mask[row].bool()], model(**alone).logits[0]) < 2e-5
            assert torch.equal(generated[row : row + 1], model.generate(**alone, **GREEDY)[:, -NEW:])


@pytest.mark.parametrize("route", ROUTES)
def test_generation_thinks_where_training_does(route):
    """Cached decoding against one forward in which the new tokens are the answer that is learned."""
    model, batch = attached(route), prompts([1, 2], "left")
    output = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    new = output.sequences[:, -NEW:]
    assert torch.equal(output.sequences[:, :-NEW], batch["input_ids"])  # the caller does not see the pauses
    longer = {
        "input_ids": output.sequences,
        "pixel_values": batch["pixel_values"],
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(new)], 1),
        "anchor_mask": torch.cat([batch["anchor_mask"], torch.zeros_like(new, dtype=torch.bool)], 1),
        "labels": torch.cat([torch.full_like(batch["input_ids"], -100), new], 1),
    }
    with torch.no_grad():
        logits = model(**longer).logits[:, -NEW - 1 : -1]
    assert difference(torch.stack(output.logits, 1), logits) < 2e-5
    beams = model.generate(**batch, **GREEDY, num_beams=2)
    assert beams.shape == output.sequences.shape


def test_without_a_mask_the_generation_prompt_is_still_found():
    batch = without_pauses(prompts([1, 2]))
    suffix = [9, 10]
    ends = batch["attention_mask"].sum(-1)
    for row, end in enumerate(ends.tolist()):
        batch["input_ids"][row, end - 2 : end] = torch.tensor(suffix)
    del batch["anchor_mask"]
    model = attached(tau=-1, generation_prompt_ids=tuple(suffix))
    with torch.no_grad():
        model(**batch)
    hosts = model.attanchor_plan.host
    assert (hosts >= 0).any()
    assert not any(int(end) - 1 in hosts[row] or int(end) - 2 in hosts[row] for row, end in enumerate(ends))


def test_prepare_inputs_has_the_pauses_too():
    model, batch = attached(), with_labels(prompts([1, 2]), 2)
    prepared = prepare_inputs(model, **batch)
    with torch.no_grad():
        assert torch.equal(model(**prepared).logits, model(**batch).logits)


@pytest.mark.parametrize("route", ROUTES)
def test_the_plan_is_in_the_callers_slots_also_behind_the_pauses(route):
    """An answer in front of the image: the pauses stand in front of it, the image and its question behind them."""
    batch, parts = two_turns("qaIQA")
    batch = without_pauses(batch)
    model, bare = attached(route, tau=-1), attached(route, tau=-1, pause_tokens=0)
    with torch.no_grad():
        model(**batch), bare(**batch)
    plan, expected = model.attanchor_plan, bare.attanchor_plan
    assert torch.equal(plan.host, expected.host)
    assert torch.equal(plan.score, expected.score)
    questions = {slot for part in "qQ" for slot in range(parts[part].start, parts[part].stop)}
    assert set(plan.host[plan.host >= 0].tolist()) <= questions
    assert (plan.host[0, parts["I"]] >= parts["Q"].start).any()
    before = parts["a"].start
    assert plan.source[0, : before + PAUSES].tolist() == [*range(before), *[-1] * PAUSES]
    assert plan.source[0, before + PAUSES :].tolist() == expected.source[0, before:].tolist()


def test_settings_that_make_no_sense_are_refused():
    for settings, message in (
        ({"pause_token_id": None}, "pause_tokens is 3, but pause_token_id is not set"),
        ({"direction": "text_into_image"}, "think mode belongs to 'image_into_text'"),
        ({"pause_tokens": -1}, "pause_tokens is -1; it should be at least 0"),
        ({"pause_tokens": 10**9}, "pause_tokens is 1000000000; it should be at most 4096"),
        ({"pause_token_id": 64}, "pause_token_id is 64; the model's vocabulary has 64 tokens"),
        ({"pause_token_id": 3}, "pause_token_id is 3, the model's image placeholder"),
    ):
        with pytest.raises(ValueError, match=message):
            attached(**settings)
    with pytest.raises(TypeError, match="pause_tokens is float; it should be an int"):
        attached(pause_tokens=1.5)
    config = AttAnchorConfig(tau=0.1, direction="image_into_text", pause_tokens=2, pause_token_id=5)
    assert AttAnchorConfig.from_dict(config.to_dict()) == config
    model, batch = attached(positions="inherit", force_inherit=True), prompts([1])
    with pytest.raises(ValueError, match="position_ids is given, but pause tokens are added"):
        model(**batch, position_ids=torch.arange(batch["input_ids"].shape[1])[None])


def test_the_pause_token_is_named_and_must_mean_nothing_else():
    tokenizer = byte_level_tokenizer()
    config = AttAnchorConfig(tau=0.1, direction="image_into_text")
    assert with_pauses(config, tokenizer, 0, None) is config
    made = with_pauses(config, llava_processor(tokenizer, CHATML), 4, "<|im_start|>")
    assert (made.pause_tokens, made.pause_token_id) == (4, tokenizer.convert_tokens_to_ids("<|im_start|>"))
    with pytest.raises(ValueError, match=r"pause_token '<p>' is no token of the model's vocabulary.*such as '<pad>'"):
        with_pauses(config, tokenizer, 4, "<p>")
    for token in ("<s>", "<|im_end|>", "<image>"):
        with pytest.raises(ValueError, match="begins or ends texts or stands for an image"):
            with_pauses(config, llava_processor(tokenizer, CHATML), 4, token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pause-tokens", "3", "--pause-token", "<pad>"], "pause_tokens is 3 with direction 'text_into_image'"),
        (["--direction", "image_into_text", "--pause-tokens", "3"], "pause_tokens is 3, but there is no pause_token"),
        (["--direction", "image_into_text", "--pause-tokens", "-3"], "pause_tokens is -3; it should be at least 0"),
        (["--direction", "image_into_text", "--pause-token", "<pad>"], "pause_token is '<pad>', but pause_tokens is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_read(options, message, capsys):
    arguments = ["--model", "gone", "--data", "gone", "--images", "gone", "--output", "gone"]
    assert cli.main(["train", *arguments, *options]) == 1
    assert message in capsys.readouterr().err


def test_think_mode_by_the_command_line(tmp_path, capsys):
    processor = save_random_model(tmp_path / "model")
    scenes.write_dataset(tmp_path, "train", 4, seed=0)
    options = {"--model": tmp_path / "model", "--data": tmp_path / "train.json", "--images": tmp_path / "images"}
    options |= {"--preset": "small-llava", "--tau": -1, "--max-steps": 1, "--batch-size": 2, "--val-fraction": 0}
    options |= {"--direction": "image_into_text", "--pause-tokens": 3}
    words = [str(word) for option in options.items() for word in option]
    assert cli.main(["train", *words, "--output", str(tmp_path / "no"), "--pause-token", "<p>"]) == 1
    assert "pause_token '<p>' is no token of the model's vocabulary" in capsys.readouterr().err
    assert cli.main(["train", *words, "--output", str(tmp_path / "run"), "--pause-token", "<pad>"]) == 0
    settings = load_settings(tmp_path / "run")
    assert (settings.direction, settings.pause_tokens) == ("image_into_text", 3)
    assert settings.pause_token_id == processor.tokenizer.pad_token_id
