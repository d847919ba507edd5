"""The fifteen metrics as tables and pictures show them, and the paper's values of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. `sign` -1 shows the negative, so that higher is better everywhere."""

    title: str
    decimals: int
    sign: int = 1


# In the paper's order; the loss is shown negated, as there.
METRICS: dict[str, Metric] = {
    "loss": Metric("validation loss (negated)", 4, -1),
    "bleu": Metric("BLEU", 4),
    "bertscore": Metric("BERTScore", 4),
    "meteor": Metric("METEOR", 4),
    "cider": Metric("CIDEr", 4),
    "rougeL": Metric("ROUGE-L", 4),
    "vqav2": Metric("VQAv2", 2),
    "scienceqa": Metric("ScienceQA", 2),
    "gqa": Metric("GQA", 2),
    "vizwiz": Metric("VizWiz", 2),
    "mmbench": Metric("MMBench", 2),
    "mme": Metric("MME", 0),
    "pope": Metric("POPE", 2),
    "amber": Metric("AMBER", 1),
    "hallusionbench": Metric("HallusionBench", 2),
}
# And one that is not of the paper: short answers that are right to the letter.
SHOWN = {**METRICS, "exact": Metric("exact match", 4)}

SOURCE = "AttAnchor, arXiv 2509.23109, tables of results by threshold and by model"

BASELINE, TEXT_INTO_IMAGE, IMAGE_INTO_TEXT = "baseline", "text_into_image", "image_into_text"
_DIRECTIONS = (BASELINE, TEXT_INTO_IMAGE, IMAGE_INTO_TEXT)
_TAUS = (1.0, 0.16, 0.14, 0.12, 0.10, 0.08)

# TinyLLaVA 1B by threshold, in the order of _TAUS.
_BY_TAU = {
    "loss": (-1.0716, -1.0706, -1.0704, -1.0712, -1.0706, -1.0710),
    "bleu": (0.5663, 0.5654, 0.5698, 0.5680, 0.5652, 0.5670),
    "bertscore": (0.9616, 0.9616, 0.9619, 0.9617, 0.9615, 0.9617),
    "meteor": (0.6888, 0.6877, 0.6917, 0.6901, 0.6898, 0.6895),
    "cider": (4.0793, 4.0665, 4.0990, 4.0860, 4.0508, 4.0781),
    "rougeL": (0.7054, 0.7058, 0.7080, 0.7066, 0.7051, 0.7061),
    "vqav2": (69.11, 69.74, 69.64, 70.11, 69.77, 70.45),
    "scienceqa": (54.94, 55.46, 55.25, 54.92, 54.94, 54.14),
    "gqa": (54.24, 55.26, 54.04, 55.00, 54.69, 54.95),
    "vizwiz": (42.36, 36.09, 43.24, 31.54, 37.49, 36.21),
    "mmbench": (12.97, 15.29, 17.10, 13.06, 11.86, 15.29),
    "mme": (1392, 1391, 1371, 1452, 1424, 1465),
    "pope": (75.06, 61.9, 75.4, 84.8, 81.7, 85.1),
    "amber": (81.2, 81.4, 81.6, 81.8, 81.3, 82.3),
    "hallusionbench": (37.11, 37.73, 39.50, 40.21, 39.15, 39.06),
}
# By model, in the order of _DIRECTIONS.
_BY_MODEL = {
    "tinyllava-1b": {
        "loss": (-1.0716, -1.0712, -1.0728),
        "bleu": (0.5663, 0.5680, 0.5652),
        "bertscore": (0.9616, 0.9617, 0.9614),
        "meteor": (0.6888, 0.6901, 0.6893),
        "cider": (4.0793, 4.0860, 4.0423),
        "rougeL": (0.7054, 0.7066, 0.7050),
        "vqav2": (69.11, 70.11, 69.87),
        "scienceqa": (54.94, 54.92, 54.66),
        "gqa": (54.24, 55.00, 54.66),
        "vizwiz": (42.36, 31.54, 38.04),
        "mmbench": (12.97, 13.06, 16.41),
        "mme": (1392, 1452, 1401),
        "pope": (75.06, 84.83, 86.63),
        "amber": (81.2, 81.8, 79.9),
        "hallusionbench": (37.11, 40.21, 36.58),
    },
    "llava-7b": {
        "loss": (-1.0224, -1.0146, -1.0166),
        "bleu": (0.5819, 0.5828, 0.5833),
        "bertscore": (0.9636, 0.9636, 0.9637),
        "meteor": (0.7021, 0.7033, 0.7029),
        "cider": (4.2556, 4.2837, 4.2825),
        "rougeL": (0.7192, 0.7200, 0.7203),
        "vqav2": (76.16, 75.86, 75.94),
        "scienceqa": (68.22, 69.87, 68.62),
        "gqa": (60.91, 60.60, 60.57),
        "vizwiz": (47.6, 48.0, 49.5),
        "mmbench": (47.65, 47.68, 49.39),
        "mme": (1784, 1800, 1788),
        "pope": (86.60, 86.70, 86.63),
        "amber": (86.1, 86.3, 85.9),
        "hallusionbench": (42.07, 40.12, 41.63),
    },
    "qwen2.5-vl-3b": {
        "loss": (-1.2928, -1.2924, -1.2920),
        "bleu": (0.5738, 0.5726, 0.5754),
        "bertscore": (0.9623, 0.9624, 0.9624),
        "meteor": (0.6961, 0.6964, 0.6967),
        "cider": (4.2122, 4.1945, 4.2356),
        "rougeL": (0.7120, 0.7126, 0.7130),
        "vqav2": (78.93, 78.42, 78.65),
        "scienceqa": (67.79, 68.26, 68.05),
        "gqa": (56.42, 55.87, 55.84),
        "vizwiz": (58.73, 58.32, 60.01),
        "mmbench": (75.94, 76.38, 75.43),
        "mme": (1978, 2002, 2022),
        "pope": (85.90, 86.60, 85.83),
        "amber": (87.8, 87.9, 87.7),
        "hallusionbench": (53.41, 52.79, 51.37),
    },
}


def metric(name: str) -> Metric:
    """How a metric is shown; under its own name and as it is, if it is none of `SHOWN`."""
    return SHOWN.get(name, Metric(name, 4))


def paper_values(model: str, direction: str = BASELINE, tau: float | None = None) -> dict[str, float] | None:
    """What the paper has for a model and an arm, with the loss negated as it prints it; None if it has no such column.

    Args:
        model: A preset's name, such as "tinyllava-1b".
        direction: "baseline", "text_into_image" or "image_into_text".
        tau: Of "text_into_image"; None for the one of the paper's table by model.
    """
    if tau is not None and tau >= 1:
        direction = BASELINE
    if model == "tinyllava-1b" and direction != IMAGE_INTO_TEXT and tau is not None:
        if round(tau, 4) not in _TAUS:
            return None
        column = _TAUS.index(round(tau, 4))
        return {name: values[column] for name, values in _BY_TAU.items()}
    if model not in _BY_MODEL:
        return None
    column = _DIRECTIONS.index(direction)
    return {name: values[column] for name, values in _BY_MODEL[model].items()}
