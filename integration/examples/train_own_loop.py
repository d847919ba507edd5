"""The same training with a loop of your own: python train_own_loop.py MODEL DATA.json IMAGES OUTPUT [STEPS]

`attanchor train`, and in Python `attanchor_vlm.train`, do this and more (validation, checkpoints, resuming). This shows
the parts.
"""

import random
import sys
from pathlib import Path

import torch

from attanchor_vlm import (
    AttAnchorConfig,
    Collator,
    add_lora,
    attach,
    load_pretrained,
    read_rows,
    samples,
    save_settings,
)

name, data, images, output, *steps = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"

rows, _ = read_rows(Path(data), Path(images))  # every bad row is an error, here and not after an hour
training = list(samples(rows, "each"))
model, processor = load_pretrained(name)
attach(model, AttAnchorConfig(tau=0.12))
model = add_lora(model, rank=32, alpha=64, dropout=0.05)  # language model and projector, never the tower
model.to(device).train()
collate = Collator(processor, "each")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

for step in range(int(steps[0]) if steps else 100):
    batch = collate(random.sample(training, min(4, len(training))))
    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    stats = model.get_base_model().attanchor_stats
    print(f"step {step + 1}: loss {loss.item():.4f}, inserted {stats.share_of_candidates.item():.1%}")

model.save_pretrained(output)
save_settings(model, output)  # tau and direction belong to the adapter
