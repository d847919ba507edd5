"""Will anchors work for a model? What its cosines say, before any training: `attanchor probe`.

prompts = list(prompt_scores(model, processor, choose(samples, 256)))
probe = measure(prompts)
probe.verdict, probe.reasons
"""

from attanchor_vlm.probe.control import permute_projector, save
from attanchor_vlm.probe.measures import DOES_NOT_FOLLOW, FOLLOWS, TAUS, UNDECIDED, WEAK, Probe, measure
from attanchor_vlm.probe.scores import PromptScores, choose, prompt_scores

__all__ = [
    "DOES_NOT_FOLLOW",
    "FOLLOWS",
    "TAUS",
    "UNDECIDED",
    "WEAK",
    "Probe",
    "PromptScores",
    "choose",
    "measure",
    "permute_projector",
    "prompt_scores",
    "save",
]
