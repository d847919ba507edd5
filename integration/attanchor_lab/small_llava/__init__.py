"""A small real LLaVA that is trained here and shipped, for samples, demonstrations and tests."""
