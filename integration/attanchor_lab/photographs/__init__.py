"""Scenes of photographed things on photographs, with questions; concepts and wordings are held out."""
