"""Runs a model: pools on the device (`cache`), one step's instructions (`batch`), the jitted step (`program`), sampling
of tokens (`sampling`), and the loop from prompts to tokens (`generate`)."""
