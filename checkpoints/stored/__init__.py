"""Reads stored leaves: their names and shapes, the chunks of their files, and the manifest of a converted folder."""
