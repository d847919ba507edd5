"""For inference engines that know nothing of anchors: the language model as a checkpoint of its own, and its prompts as
rows of embeddings in which image features and anchors already stand.

    export_language_model(model, processor, "llava-text")           # once; `attanchor export-lm`
    rows = prompt_embeds(model, processor, chat, [image]).embeds    # for each question: (L, D)
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attanchor_vlm.chat.encode import encode_chat
from attanchor_vlm.data.batches import to_model
from attanchor_vlm.inference.widen import widen_heads
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.adapter_files import save_settings
from attanchor_vlm.model.attach import base_of, is_attached
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.families.base import flat
from attanchor_vlm.model.plan import AnchorPlan
from attanchor_vlm.model.rewrite import rewrite
from attanchor_vlm.records import check_parent, write_folder


class ServingError(ValueError):
    """The model cannot be served by an engine that takes prompt embeddings; the message says why."""


class PromptEmbeds(NamedTuple):
    """One prompt with its image features and anchors, as an engine takes it: L tokens, hidden size D.

    Attributes:
        embeds: (L, D), in the dtype and on the device of the model.
        position_ids: (L,) int64: 0, 1, 2, …, which is what engines count themselves.
        input_ids: (L,) int64: the token of each row, the image placeholder at image features. For an engine's logits
            processors, such as a repetition penalty; never to be looked up instead of the rows.
    """

    embeds: Tensor
    position_ids: Tensor
    input_ids: Tensor


@torch.no_grad()
def prompt_embeds(
    model: Any,
    processor: Any,
    chat: Sequence[Mapping[str, Any]],
    images: Sequence[Any] | None = None,
    *,
    template_options: Mapping[str, Any] | None = None,
) -> PromptEmbeds:
    """The embeddings of a conversation that the assistant is to answer. Only the image encoder, the projector and the
    embedding table run.

    Args:
        model: An attached model, or a PeftModel around one. With tau >= 1 the rows are those of the plain prompt.
        processor: Its processor.
        chat: Messages as `encode_chat` takes them, the last one the user's.
        images: The images of the conversation, in order; None takes them from its image parts.
        template_options: Further variables for the chat template.

    Raises:
        ServingError: the family or its settings cannot be served this way, see `check_servable`.
        ValueError: the model is not attached; and whatever `encode_chat` refuses.
    """
    target = base_of(model)
    if not is_attached(target):
        raise ValueError(
            f"{type(target).__name__} is not attached; it should be a model given to attach or load_adapter"
        )
    check_servable(target)
    target.eval()
    encoded = encode_chat(
        processor,
        chat,
        images,
        add_generation_prompt=True,
        template_options=template_options,
        content_words=target.attanchor_config.content_words,
    )
    batch = to_model(encoded, target)
    if not adapter_for(target).has_images(batch):
        ids = batch["input_ids"][0]
        return PromptEmbeds(target.get_input_embeddings()(ids), torch.arange(len(ids), device=ids.device), ids)
    embeds, plan = prompt_rows(target, batch)
    positions = plan.position_ids[0]  # M-RoPE's are the same on every axis: inherited ones are refused
    return PromptEmbeds(embeds, positions[0] if positions.dim() == 2 else positions, plan.input_ids[0])


def prompt_rows(model: Any, batch: dict[str, Any]) -> tuple[Tensor, AnchorPlan]:
    """(L, D) rows of a batch of one conversation with images, and its plan, which is recorded too.

    Where image features are also added in further layers (deepstack), those stand behind, zeros at text and its copies.

    Args:
        model: An attached model of transformers; of its language model, the embedding table alone is used.
        batch: What `encode_chat` returns, on the model's device.
    """
    adapter = adapter_for(model)
    route = "embeds" if "embeds" in adapter.routes else "ids"  # of deepstack
    settings = dataclasses.replace(model.attanchor_config, route=route)
    if settings.changes_nothing:  # generate hands such calls through, without pauses
        settings = dataclasses.replace(settings, pause_tokens=0)
    prepared = rewrite(model, adapter, settings, batch, batch.pop("anchor_mask"), "left")
    plan = prepared.plan
    model.record_plan(plan)
    if route == "embeds":
        return prepared.prompt["inputs_embeds"][0], plan
    holds = adapter.placeholders(model, plan.input_ids)[0]
    encoded = prepared.prompt["mm_encoder_outputs"]["image"]
    features = torch.cat([adapter.feature_rows(encoded), *map(flat, encoded.deepstack_features)], -1)
    text = model.get_input_embeddings()(plan.input_ids[0].masked_fill(holds, 0))
    rows = nn.functional.pad(text, (0, features.shape[-1] - text.shape[-1]))
    rows[holds] = features.to(rows)
    return rows, plan


def check_servable(model: Any) -> None:
    """Refuse models whose prompts are more than rows of embeddings at the positions 0, 1, 2, …

    Raises:
        ServingError: M-RoPE, image features added in later layers, image tokens that see later ones, or positions that
            are inherited.
    """
    target = base_of(model)
    per_token = adapter_for(target).positions_per_token
    reasons = [refusal(target)]
    if per_token > 1 and _inherits(target):
        reasons.insert(
            0,
            f"its tokens have {per_token} positions each (M-RoPE: time, height, width), and engines give prompt "
            "embeddings one, counted; attach it with positions='sequential', or serve it with `attanchor serve`",
        )
    if reason := "; ".join(filter(None, reasons)):
        raise ServingError(
            f"{target.config.model_type} cannot be served by prompt embeddings: {reason}. Use `generate` of the "
            "attached model"
        )


def check_family(model: str) -> None:
    """`check_servable` of a saved model or a Hub id by its config alone, before its weights are loaded."""
    from transformers import AutoConfig

    source = loading.source_of(model)
    try:
        empty = loading.empty_model(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except Exception:
        return  # what is wrong with it is said when it is loaded
    check_servable(empty)


def refusal(model: Any, layers: bool = False) -> str | None:
    """Why a model's prompts are more than rows of embeddings at positions; None if they are not.

    Args:
        layers: The engine takes features for further layers beside the rows, as `prompt_rows` makes them.
    """
    adapter, reasons = adapter_for(model), []
    deeper = any("deepstack" in name for name, _ in model.base_model.named_modules())
    if deeper and not layers:
        reasons.append("further image features are added in its first layers (deepstack), which embeddings do not hold")
    if any(value is not None for value in adapter.token_types.values()):
        reasons.append(
            "its image tokens see later ones (bidirectional attention), which a plain causal language model hides"
        )
    if not reasons and not deeper and "embeds" not in adapter.routes:
        reasons.append("its forward cannot be given inputs_embeds that hold the images")
    if adapter.positions_per_token == 1 and _inherits(model):
        reasons.append(
            "positions is 'inherit', but engines count the positions of this family's tokens, 0, 1, 2, …; use "
            "'sequential', with which the adapter should be trained too"
        )
    return "; ".join(reasons) or None


def _inherits(model: Any) -> bool:
    return ((is_attached(model) and model.attanchor_config.positions) or adapter_for(model).positions) == "inherit"


# --- The checkpoint. -------------------------------------------------------------------------------------------------


@torch.no_grad()
def language_model(model: Any) -> Any:
    """The language half of a model as the plain causal model of its own architecture (`LlamaForCausalLM`,
    `Qwen2ForCausalLM`, …). It shares the weights of `model`.

    Args:
        model: A transformers model of a family with one position per token, attached or not. Merge adapters first.

    Raises:
        ServingError: see `check_servable`; or an adapter is not merged, or the language half does more than the causal
            model of its architecture, which is found by comparing their logits.
    """
    from transformers import AutoModelForCausalLM

    target = base_of(model)
    check_servable(target)
    if any(hasattr(module, "base_layer") for module in target.modules()):
        raise ServingError("an adapter stands in the model's layers; merge it first (PeftModel.merge_and_unload)")
    decoder = target.get_decoder()
    config = copy.deepcopy(target.config.get_text_config())
    head = target.get_output_embeddings()
    config.tie_word_embeddings = head.weight is target.get_input_embeddings().weight
    config.dtype = head.weight.dtype
    try:
        with torch.device("meta"):
            attention = getattr(decoder.config, "_attn_implementation", None)
            causal: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError as error:
        raise ServingError(
            f"transformers has no causal language model for {type(config).__name__}, the language half of "
            f"{type(target).__name__}"
        ) from error
    if type(causal.base_model) is not type(decoder):
        raise ServingError(
            f"the language half of {type(target).__name__} is a {type(decoder).__name__}, but "
            f"{type(causal).__name__} holds a {type(causal.base_model).__name__}"
        )
    setattr(causal, causal.base_model_prefix, decoder)
    causal.set_output_embeddings(head)
    causal.generation_config = copy.deepcopy(target.generation_config)
    causal.eval()
    _check_logits(target, causal)
    return causal


def _check_logits(model: Any, causal: Any) -> None:
    """A family may scale or cap between decoder and logits in its own way; on a few random rows it would show."""
    table = model.get_input_embeddings()
    ids = torch.arange(8, device=table.weight.device) * (table.num_embeddings // 8)
    rows = table(ids)[None]
    training = model.training
    model.eval()
    own, plain = (part(inputs_embeds=rows, use_cache=False).logits.float() for part in (model, causal))
    model.train(training)
    error = float((own - plain).abs().max())
    if not error <= 1e-2 * float(own.abs().max()):
        raise ServingError(
            f"the logits of {type(causal).__name__} differ from those of {type(model).__name__} by {error:.3g}: the "
            "family does something of its own between its language half and its logits"
        )


def export_language_model(model: Any, processor: Any, output: str | os.PathLike[str]) -> Path:
    """Write the language half of a model as a plain causal checkpoint with its tokenizer: any program that loads
    `LlamaForCausalLM` (or what the family's language half is) loads it. Rows come from `prompt_embeds`.

    An adapter is merged into `model` itself, whose image encoder and projector `prompt_embeds` goes on using.
    ``attanchor.json`` beside the weights keeps the settings that prompts should be made with, if there are any.

    Args:
        model: A transformers model, attached or not, or a PeftModel around one.
        processor: Its processor.
        output: A folder that does not exist or is empty; written whole or not at all.

    Raises:
        ServingError: see `language_model`.
        ValueError: `output` holds something.
    """
    output = Path(output)
    check_output(output)
    check_servable(model)
    merged = _merged(model)
    causal = language_model(merged)

    def write(folder: Path) -> None:
        causal.save_pretrained(folder)
        getattr(processor, "tokenizer", processor).save_pretrained(folder)
        if is_attached(merged):
            save_settings(merged, folder)

    write_folder(output, write)
    return output


def export_model(model: Any, processor: Any, output: str | os.PathLike[str], head_dim: int | None = None) -> Path:
    """Write a whole model with its processor, the adapter merged into it (into `model` itself, too). config.json keeps
    the settings, with which `load` and `attanchor serve` attach it; transformers loads it plain.

    Args:
        model: An attached model, or a PeftModel around one.
        processor: Its processor.
        output: A folder that does not exist or is empty; written whole or not at all.
        head_dim: See `widen_heads`; None leaves attention heads as they are.

    Raises:
        ValueError: `output` holds something, or the heads cannot be widened.
    """
    output = Path(output)
    check_output(output)
    merged = _merged(model)
    if head_dim is not None:
        widen_heads(merged, head_dim)
    loading.save_pretrained(merged, processor, output)
    return output


def _merged(model: Any) -> Any:
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def check_output(output: Path) -> None:
    """Refuse a folder that holds something, or that cannot be made."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder; take another")
    check_parent(output)


def release_language_layers(model: nn.Module) -> None:
    """Free what `prompt_embeds` does not need: the layers of the language model and its output head. `forward` and
    `generate` of `model` no longer work."""
    target = base_of(model)
    target.get_decoder().layers = nn.ModuleList()
    if target.get_output_embeddings().weight is not target.get_input_embeddings().weight:
        target.set_output_embeddings(nn.Identity())
