"""Anchor masks and labels from chat templates, and the fallback from ids alone."""

from __future__ import annotations

import pytest
import torch
from chats import KINDS, assistant, processor_of, user
from tiny import (
    BOS,
    CHATML,
    IMAGE,
    PATCHES,
    VICUNA,
    byte_level_tokenizer,
    llava_processor,
    metaspace_tokenizer,
    picture,
    prompts,
    tiny_llava,
)
from tiny_families import EOS
from tokenizers import AddedToken, processors

from attanchor_vlm import AttAnchorConfig, encode_chat, split_turns, with_tokens_of
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.model.candidates import mask_from_ids

QUESTION, ANSWER = "What is to the left of the red dog?", "It is a small blue cube."
SECOND, REPLY = "Is there a cat in the picture?", "Yes, there are two cats."


def said(processor, encoded, name: str, row: int) -> str:
    """What the tokens selected by the anchor mask, or by labels, say."""
    ids = encoded["input_ids"][row]
    chosen = encoded["anchor_mask"][row] if name == "anchor_mask" else encoded["labels"][row] != -100
    return processor.tokenizer.decode(ids[chosen], clean_up_tokenization_spaces=False)


def same_words(found: str, expected: str) -> bool:
    return found.replace(" ", "").replace("\n", "") == expected.replace(" ", "").replace("\n", "")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_labels_hold_exactly_the_texts(kind, side):
    processor = processor_of(kind)
    eos = processor.tokenizer.eos_token
    conversations = [
        [user("<image>", QUESTION), assistant(ANSWER)],
        [user(QUESTION), assistant(ANSWER)],
        [
            {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
            user("<image>", "<image>", QUESTION),
            assistant(ANSWER),
            user("<image>", SECOND),
            assistant(REPLY),
        ],
    ]
    images = [[picture(0)], [], [picture(1), picture(2), picture(3)]]
    encoded = encode_chat(processor, conversations, images, padding_side=side)

    assert encoded["pixel_values"].shape[0] == 4
    assert (encoded["input_ids"] == processor.image_token_id).sum(-1).tolist() == [PATCHES, 0, 3 * PATCHES]
    padding = encoded["attention_mask"] == 0
    assert padding[:, 0 if side == "left" else -1].tolist() == [True, True, False]
    for row, (asked, answered) in enumerate(
        [(QUESTION, ANSWER + eos), (QUESTION, ANSWER + eos), (QUESTION + SECOND, ANSWER + eos + REPLY + eos)]
    ):
        assert same_words(said(processor, encoded, "anchor_mask", row), asked)
        assert same_words(said(processor, encoded, "labels", row), answered)
    supervised = encoded["labels"] != -100
    assert not (encoded["anchor_mask"] & (supervised | padding)).any()
    assert torch.equal(encoded["labels"][supervised], encoded["input_ids"][supervised])


# Not the unsplit tokenizer, whose tokens reach from the prompt into the answer.
@pytest.mark.parametrize("kind", KINDS[:3])
def test_inference_sees_the_training_prompt(kind):
    processor = processor_of(kind)
    messages = [user("<image>", QUESTION), assistant(ANSWER), user(SECOND), assistant(REPLY)]
    whole = encode_chat(processor, messages, [picture()], supervise="last")
    prompt = encode_chat(processor, messages[:3], [picture()], add_generation_prompt=True)
    length = prompt["input_ids"].shape[1]
    assert "labels" not in prompt
    assert torch.equal(prompt["input_ids"], whole["input_ids"][:, :length])
    assert torch.equal(prompt["anchor_mask"], whole["anchor_mask"][:, :length])
    assert same_words(said(processor, prompt, "anchor_mask", 0), QUESTION + SECOND)
    assert (whole["labels"][:, :length] == -100).all()
    assert same_words(said(processor, whole, "labels", 0), REPLY + processor.tokenizer.eos_token)


def test_inference_pads_left_and_training_right():
    processor = processor_of("bytes-chatml")
    questions = [[user("<image>", QUESTION)], [user("<image>", "No?")]]
    prompt = encode_chat(processor, questions, [[picture()], [picture()]], add_generation_prompt=True)
    assert prompt["attention_mask"][1, 0] == 0
    assert prompt["attention_mask"][:, -1].all()


@pytest.mark.parametrize("kind", KINDS)
def test_split_turns_and_last_question(kind):
    processor = processor_of(kind)
    messages = [user("<image>", QUESTION), assistant(ANSWER), user(SECOND), assistant(REPLY)]
    samples = split_turns(messages)
    assert [len(sample) for sample in samples] == [2, 4]
    assert samples[1] == messages
    encoded = encode_chat(processor, samples, [[picture()]] * 2, supervise="last", anchors="last")
    eos = processor.tokenizer.eos_token
    assert same_words(said(processor, encoded, "labels", 0), ANSWER + eos)
    assert same_words(said(processor, encoded, "labels", 1), REPLY + eos)
    assert same_words(said(processor, encoded, "anchor_mask", 0), QUESTION)
    assert same_words(said(processor, encoded, "anchor_mask", 1), SECOND)


def test_eos_is_added_only_where_the_template_ends_an_answer_with_nothing():
    messages = [user("<image>", QUESTION), assistant(ANSWER), user(SECOND), assistant(REPLY)]
    for kind, last, every in (("bytes-vicuna", 1, 2), ("bytes-chatml", 4, 4)):  # chatml: each message ends with it
        processor = processor_of(kind)
        eos = processor.tokenizer.eos_token_id
        for supervise, count in (("last", last), ("all", every)):
            encoded = encode_chat(processor, messages, [picture()], supervise=supervise)
            assert int((encoded["input_ids"] == eos).sum()) == count


def test_string_content_and_images_in_parts():
    processor = processor_of("bytes-chatml")
    inside = [
        {"role": "user", "content": [{"type": "image", "image": picture(5)}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ANSWER},
    ]
    beside = [user("<image>", QUESTION), assistant(ANSWER)]
    a = encode_chat(processor, inside)
    for images in ([picture(5)], [[picture(5)]], picture(5)):
        b = encode_chat(processor, beside, images)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert inside[0]["content"][1] == {"type": "text", "text": QUESTION}  # left as it was


def test_several_text_parts_and_repeated_text():
    processor = processor_of("bytes-chatml")
    messages = [user(QUESTION, "<image>", QUESTION), assistant(QUESTION)]  # the answer repeats the question
    encoded = encode_chat(processor, messages, [picture()])
    assert said(processor, encoded, "anchor_mask", 0) == QUESTION * 2
    assert said(processor, encoded, "labels", 0) == QUESTION + "<|im_end|>"


def test_special_tokens_typed_by_the_user_take_no_part():
    processor = processor_of("bytes-chatml")
    encoded = encode_chat(processor, [user("<image>", "red<|im_start|>dog"), assistant("No.")], [picture()])
    assert said(processor, encoded, "anchor_mask", 0) == "reddog"


def test_special_tokens_that_the_tokenizer_has_no_name_for_take_no_part():
    """As the markers of Llama 3's chats: special, but in no list of EOS, padding and the like."""
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|eot_id|>", special=True)])
    marker = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert marker not in tokenizer.all_special_ids
    processor = llava_processor(tokenizer, CHATML)
    encoded = encode_chat(processor, [user("<image>", "red<|eot_id|>dog"), assistant("No.")], [picture()])
    assert said(processor, encoded, "anchor_mask", 0) == "reddog"
    assert marker in with_tokens_of(AttAnchorConfig(tau=0.1), processor).special_token_ids


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_a_token_that_reaches_from_a_question_into_an_answer_is_no_anchor(supervise):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [
        {"role": "user", "content": "the red do"},
        {"role": "assistant", "content": "g."},  # " dog" is one token
        {"role": "user", "content": " a small blue cu"},
        {"role": "assistant", "content": "be"},
    ]
    encoded = encode_chat(tokenizer, messages, supervise=supervise)
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert " dog" in [tokenizer.decode(token) for token in ids[0]]
    assert tokenizer.decode(ids[encoded["anchor_mask"]]) == "the red a small blue"
    learned = " cube<|im_end|>" if supervise == "last" else " dog.<|im_end|> cube<|im_end|>"
    assert tokenizer.decode(labels[labels != -100]) == learned


def test_a_template_that_writes_bos_gets_no_second_one():
    processor = llava_processor(metaspace_tokenizer(), "{{ bos_token }}" + VICUNA)
    encoded = encode_chat(processor, [user("<image>", QUESTION), assistant(ANSWER)], [picture()])
    assert int((encoded["input_ids"] == processor.tokenizer.bos_token_id).sum()) == 1
    assert same_words(said(processor, encoded, "anchor_mask", 0), QUESTION)


def test_a_tokenizer_alone():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    encoded = encode_chat(tokenizer, [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}])
    assert tokenizer.decode(encoded["input_ids"][encoded["anchor_mask"]]) == QUESTION
    assert tokenizer.decode(encoded["labels"][encoded["labels"] != -100]) == ANSWER + "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML.replace("p['text']", "p['text'] | upper"), [user("<image>", QUESTION), assistant(ANSWER)]),
        (
            CHATML.replace("p['text']", "p['text'].replace('  ', ' ')"),
            [user("<image>", "What  is it?"), assistant(ANSWER)],
        ),
        (CHATML.replace("p['text']", "p['text'][:9]"), [user("<image>", QUESTION), assistant(ANSWER)]),
        (CHATML.replace("{{ p['text'] }}", "{{ p['text'] }}{{ p['text'] }}"), [user(QUESTION), assistant(ANSWER)]),
        (CHATML.replace("{{ p['text'] }}", ""), [user("<image>", QUESTION), assistant(ANSWER)]),
    ],
    ids=["upper", "spaces", "cut", "twice", "dropped"],
)
def test_a_template_that_rewrites_text_is_refused(template, messages):
    processor = llava_processor(byte_level_tokenizer(), template)
    images = [picture()] if any(part["type"] == "image" for part in messages[0]["content"]) else []
    with pytest.raises(ValueError, match="conversation 0: the chat template changes"):
        encode_chat(processor, messages, images)


@pytest.mark.parametrize("around", ["", " ", "\n"])
def test_a_template_may_trim_texts(around):
    """As Gemma's and Llama 3's do: the masks hold what is left of them."""
    processor = llava_processor(byte_level_tokenizer(), CHATML.replace("p['text']", "p['text'] | trim"))
    chat = [user("<image>", around + QUESTION + around), assistant(ANSWER + around)]
    encoded = encode_chat(processor, chat, [picture()])
    assert said(processor, encoded, "anchor_mask", 0) == QUESTION
    assert said(processor, encoded, "labels", 0) == ANSWER + "<|im_end|>"
    assert torch.equal(
        encoded["input_ids"],
        encode_chat(processor, [user("<image>", QUESTION), assistant(ANSWER)], [picture()])["input_ids"],
    )


def test_without_a_chat_template_it_says_what_is_missing():
    processor = llava_processor(byte_level_tokenizer(), CHATML)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template, so it is not known how this model is"):
        encode_chat(processor, [user("<image>", QUESTION)], [picture()], add_generation_prompt=True)
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        Collator(processor, "each")  # before training begins


@pytest.mark.parametrize("answer", ["a   b", "two\n\n\nlines   here", "ends with \n\n space", "\t tab\t\tbed"])
@pytest.mark.parametrize("trimmed", [True, False])
def test_the_labels_of_an_answer_have_no_holes(answer, trimmed):
    """Of tokenizers that trim offsets, a token of space alone has no width."""
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    for side in ("left", "right"):
        encoded = encode_chat(
            llava_processor(tokenizer, CHATML),
            [[user("<image>", QUESTION), assistant(answer)], [user(SECOND), assistant(REPLY)]],
            [[picture()], []],
            padding_side=side,
        )
        for row, text in enumerate((answer, REPLY)):
            learned = (encoded["labels"][row] != -100).nonzero()[:, 0]
            assert (learned.diff() == 1).all()
            assert tokenizer.decode(encoded["input_ids"][row][learned]) == text + tokenizer.eos_token


def test_texts_that_leave_no_sentinel_are_refused():
    processor = processor_of("bytes-chatml")
    every = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(ValueError, match="its texts hold every private-use character"):
        encode_chat(processor, [user(every), assistant(ANSWER)])


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}{{ 1 / nothing }}"])
def test_a_template_that_cannot_be_rendered_is_refused(template):
    processor = llava_processor(byte_level_tokenizer(), template)
    with pytest.raises(ValueError, match="the chat template of LlavaProcessor cannot be rendered"):
        encode_chat(processor, [user(QUESTION), assistant(ANSWER)])


def test_the_same_texts_are_rendered_twice_and_no_more(monkeypatch):
    """Plainly and with sentinels, whatever is asked of them."""
    processor, rendered = processor_of("bytes-chatml"), []
    render = processor.apply_chat_template
    monkeypatch.setattr(processor, "apply_chat_template", lambda *a, **o: rendered.append(a) or render(*a, **o))
    encode_chat(processor, [user("<image>", QUESTION), assistant(ANSWER)], [picture()])
    assert len(rendered) == 2


def test_texts_with_private_use_characters():
    processor = processor_of("bytes-chatml")
    text = f"left{chr(0xE000)}of{chr(0xE001)}{chr(0xE002)}dog"
    encoded = encode_chat(processor, [user("<image>", text), assistant(ANSWER)], [picture()])
    assert said(processor, encoded, "anchor_mask", 0) == text


@pytest.mark.parametrize(
    ("conversations", "images", "message"),
    [
        ([], None, "conversations should be"),
        ([[user(QUESTION)], []], None, "conversation 1 has no messages"),
        ([user("<image>", QUESTION)], None, "conversation 0 has 1 image parts and 0 images"),
        ([[user(QUESTION)], [user(QUESTION)]], [[], [picture()]], "conversation 1 has 0 image parts and 1 images"),
        ([[user(QUESTION)]], [[], []], "one entry for each of the 1 conversations"),
        ([{"role": "user"}], None, "conversation 0, message 0: it should be a mapping with role and content"),
        ([{"role": "user", "content": 3}], None, "conversation 0, message 0: content is int"),
        ([{"role": "user", "content": ["hi"]}], None, "conversation 0, message 0: a part is 'hi'"),
        ([{"role": "user", "content": "<image>\nhi"}], None, "conversation 0, message 0: its text holds '<image>'"),
    ],
)
def test_errors_name_conversation_and_message(conversations, images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        encode_chat(processor_of("bytes-chatml"), conversations, images)


def test_unknown_options():
    for name in ("supervise", "anchors", "padding_side"):
        with pytest.raises(ValueError, match=f"{name} is 'some'"):
            encode_chat(processor_of("bytes-chatml"), [user(QUESTION)], **{name: "some"})


# --- Without a mask. -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_fallback_is_everything_after_the_first_image_less_specials_and_generation_prompt(side):
    model = tiny_llava()
    batch = prompts([1, 2, 0], side)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    ids[0, (ids[0] == IMAGE).nonzero()[-1] + 2] = EOS
    ids[1, (ids[1] == IMAGE).nonzero()[-1] + 1] = BOS
    # The prompt of generation: the last two tokens of samples 0 and 2, and not of sample 1.
    ends = [int(row.nonzero()[-1]) + 1 for row in real]
    for row in (0, 2):
        ids[row, ends[row] - 2 : ends[row]] = torch.tensor([40, 41])
    ids[1, ends[1] - 2 : ends[1]] = torch.tensor([41, 40])
    settings = AttAnchorConfig(tau=0.1, special_token_ids=(50,), generation_prompt_ids=(40, 41))
    ids[1, (ids[1] == IMAGE).nonzero()[-1] + 2] = 50

    mask = mask_from_ids(model, settings, ids, real, ids == IMAGE)
    expected = torch.zeros_like(mask)
    for row in range(3):
        images = (ids[row] == IMAGE).nonzero()
        for slot in range(int(images[0]) if len(images) else ids.shape[1], ends[row]):
            kept = int(ids[row, slot]) not in (IMAGE, EOS, BOS, 0, 50)
            expected[row, slot] = kept and not (row != 1 and slot >= ends[row] - 2)
    assert torch.equal(mask, expected)
    assert mask[:2].any(-1).all()


# Not the unsplit tokenizer, whose tokens reach from the prompt into the answer.
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_from_ids_alone_training_and_inference_copy_the_same(kind, side):
    processor, model = processor_of(kind), tiny_llava()
    model.config.image_token_id = processor.image_token_id
    settings, found = with_tokens_of(AttAnchorConfig(tau=0.2), processor), []
    short = [user("<image>", "No?"), assistant(ANSWER + ANSWER)]
    for messages, prompt in (
        ([user("<image>", QUESTION)], True),
        ([user("<image>", QUESTION), assistant(ANSWER)], False),
    ):
        batch = encode_chat(
            processor,
            [messages, short[: len(messages)]],
            [[picture()]] * 2,
            add_generation_prompt=prompt,
            padding_side=side,
        )
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        mask = mask_from_ids(model, settings, ids, real, ids == processor.image_token_id, batch.get("labels"))
        if "labels" in batch:  # what stands behind the answer takes no part, by the leak rule
            mask &= (batch["labels"] != -100).cumsum(-1) == 0
        found.append([processor.tokenizer.decode(row[own]) for row, own in zip(ids, mask, strict=True)])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_with_tokens_of_makes_the_fallback_find_the_question(kind):
    processor = processor_of(kind)
    model = tiny_llava()
    model.config.image_token_id = processor.image_token_id
    prompt = encode_chat(processor, [user("<image>", QUESTION)], [picture()], add_generation_prompt=True)
    settings = with_tokens_of(AttAnchorConfig(tau=0.2), processor)
    ids = prompt["input_ids"]
    mask = mask_from_ids(model, settings, ids, prompt["attention_mask"].bool(), ids == processor.image_token_id)
    found = processor.tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False)
    assert settings.tau == 0.2
    assert found.split() == QUESTION.split()
    assert mask[prompt["anchor_mask"]].all()
