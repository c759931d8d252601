"""Turns weights from one stored form into another: bf16, INT4, FP8."""
