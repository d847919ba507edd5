"""PaliGemma's prompts by its own processor: prefix and suffix instead of a chat."""

from __future__ import annotations

import checkpoints
import pytest
import torch
from checkpoints import picture

from attanchor_vlm import AttAnchorConfig, attach, encode_chat

QUESTION, ANSWER = "What is to the left of the red dog?", "It is a small blue cube."
MASKED = ("input_ids", "anchor_mask")


def chat(question: str, answer: str | None = None, images: int = 1) -> list[dict]:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield checkpoints.write(tmp_path_factory.mktemp("paligemma"), "paligemma", monkeypatch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("words", [False, True])
def test_prefix_suffix_and_their_masks(made, words, side):
    _, processor = made
    tokenizer = processor.tokenizer
    questions, answers = [QUESTION, "\nIs there a cat?"], [ANSWER, "No."]
    chats = [chat(questions[0], answers[0]), chat(questions[1], answers[1], images=2)]
    images = [[picture(0)], [picture(1), picture(2)]]
    batch = encode_chat(processor, chats, images, content_words=words, padding_side=side)
    for row in range(2):
        ids, real = batch["input_ids"][row], batch["attention_mask"][row].bool()
        text = tokenizer.decode(ids[real])
        placeholders = "<image>" * 16 * (row + 1)
        assert text == f"{placeholders}<s>{questions[row].strip()}\n{answers[row]}{tokenizer.eos_token}"
        marked = tokenizer.decode(ids[batch["anchor_mask"][row]])
        assert marked.split() == (["left red dog", "cat"][row] if words else questions[row]).split()
        learned = batch["labels"][row] != -100
        assert tokenizer.decode(ids[learned]) == answers[row] + tokenizer.eos_token
        assert torch.equal(batch["token_type_ids"][row].bool(), learned)
        assert torch.equal(batch["labels"][row][learned], ids[learned])


def test_no_prompt_sees_the_answer_that_is_learned(made):
    """PaliGemma's prefix sees itself in both directions: only the token types keep the answer out of it."""
    model, processor = made
    attach(model, AttAnchorConfig(tau=-1))
    losses = []
    for answer in (ANSWER, "And now? The sky."):
        batch = encode_chat(processor, chat(QUESTION, answer), [picture(0)])
        with torch.no_grad():
            output = model(**batch)
        plan = model.attanchor_plan
        assert plan.is_anchor.any()
        losses.append(output.logits[(plan.labels == -100) & (plan.source >= 0)])
    assert torch.allclose(losses[0], losses[1], atol=1e-5)


def test_texts_around_images_stay_apart(made):
    _, processor = made
    parts = [{"type": "text", "text": "First"}, {"type": "image"}, {"type": "text", "text": "the dog?"}]
    chats = [[{"role": "user", "content": parts}], chat("the dog?")]
    batch = encode_chat(processor, chats, [[picture(0)], [picture(1)]], add_generation_prompt=True, content_words=True)
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=False)
    assert [text.rpartition("<s>")[2] for text in texts] == ["First the dog?\n", "the dog?\n"]
    marked = [processor.tokenizer.decode(ids[mask]) for ids, mask in zip(*map(batch.get, MASKED), strict=True)]
    assert [text.split() for text in marked] == [["First", "dog"], ["dog"]]


def test_a_question_to_be_answered(made):
    _, processor = made
    batch = encode_chat(processor, chat(QUESTION), [picture(0)], add_generation_prompt=True)
    assert "labels" not in batch
    assert not batch["token_type_ids"].any()
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith(f"<s>{QUESTION}\n")
    plain = encode_chat(processor, chat(QUESTION), [picture(0)])
    assert (plain["labels"] == -100).all()


def test_what_paligemma_does_not_take_is_refused(made):
    _, processor = made
    for messages, images, message in (
        (chat("Is there a cat?", "No.") + chat(QUESTION, ANSWER), 2, "one question of the user and its answer"),
        (chat("Is there a cat?", "No.", images=0), 0, "conversation 0 has no image"),
        ([{"role": "system", "content": "Be kind."}, *chat("Is there a cat?")], 1, "messages of system, user"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_chat(processor, messages, [picture(0)] * images)
    with pytest.raises(ValueError, match="some conversations have an answer and others none"):
        encode_chat(processor, [chat("a", "b"), chat("c")], [[picture(0)], [picture(1)]])
