"""Tiny parts of the small VLM, in place of those in packages."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attanchor_lab.small_vlm.parts import Parts
from attanchor_lab.small_vlm.tower import EfficientNetLite, EfficientNetLiteConfig

SIDE = 32
STAGES = ((3, 2, 1, 4, 1), (5, 2, 2, 6, 2))
NAMES = ["red cup", "owl", "green cup"]


def tower() -> EfficientNetLite:
    return EfficientNetLite(EfficientNetLiteConfig(SIDE, stem=4, stages=STAGES, channels=8)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([f" {name}" for name in NAMES], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )


def parts() -> Parts:
    torch.manual_seed(0)
    words = tokenizer()
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    text.quantization_config = {"quant_method": "gguf"}  # as that of the package's file has
    head = torch.randn(len(NAMES), 8), torch.zeros(len(NAMES))
    return Parts(LlamaForCausalLM(text), words, tower(), head, NAMES)
