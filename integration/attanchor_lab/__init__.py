"""Research on AttAnchor: does it help? Rendered scenes, a small LLaVA, the paper's experiments and a proving ground.

The laboratory imports the library (`attanchor_vlm`), never the reverse; `attanchor lab | report | experiment | demo |
sample` are its commands.
"""
