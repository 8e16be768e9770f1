"""Repeat the paper's experiments: its networks and ablations with equal encoders, steps and seeds."""
