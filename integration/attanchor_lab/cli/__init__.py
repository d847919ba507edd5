"""The laboratory's commands; `attanchor` finds them through the entry points of the group `attanchor.commands`."""

from attanchor_lab.cli import demo, lab, paper, photographs, small_vlm

__all__ = ["demo", "lab", "paper", "photographs", "small_vlm"]
