"""Fine-tune an attached model with LoRA: settings, run, checkpoints, alignment loss."""
