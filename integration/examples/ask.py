"""Ask a model about an image, with anchors: python ask.py MODEL IMAGE QUESTION [TAU]

MODEL is a folder or a Hugging Face Hub id, such as llava-hf/llava-1.5-7b-hf. `attanchor generate`, and in Python
attanchor_vlm.load and answer, do this and more: adapters, several images, files of questions. This shows the parts.
"""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from attanchor_vlm import AttAnchorConfig, attach, encode_chat

name, image, question, *tau = sys.argv[1:]
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
model.to("cuda" if torch.cuda.is_available() else "cpu")

attach(model, AttAnchorConfig(tau=float(tau[0]) if tau else 0.12))

chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
inputs = encode_chat(processor, chat, [Image.open(image).convert("RGB")], add_generation_prompt=True)
inputs = {key: value.to(model.device) for key, value in inputs.items()}
inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)

print(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
print(f"{int(model.attanchor_stats.inserted)} of {int(model.attanchor_stats.candidates)} tokens were inserted")
