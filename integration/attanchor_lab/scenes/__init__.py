"""Rendered scenes of coloured shapes, and questions about them."""
