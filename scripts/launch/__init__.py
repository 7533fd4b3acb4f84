"""Renders the files that start a training run on a cluster; docs/launch.md."""
