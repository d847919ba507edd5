"""Rows become samples, and samples batches."""
