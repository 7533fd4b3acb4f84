"""Sweeps: files whose get_sweep gives the runs (docs/experiments.md)."""
