"""The paper's experiments as commands, each leaving rows, a table and a picture. `attanchor experiment`."""
