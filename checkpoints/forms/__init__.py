"""Weights from one stored form to another: bf16, INT4, FP8."""
