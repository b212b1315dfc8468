"""Weights of other codebases as our parameters and back, in numpy only. Nothing that is read can run code."""
