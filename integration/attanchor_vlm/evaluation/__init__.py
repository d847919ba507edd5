"""The paper's fifteen metrics: validation loss, five of text, nine benchmarks through lmms-eval. `attanchor eval`."""
