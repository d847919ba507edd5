"""Ask an attached model, see where its anchors went, and export what engines need."""
