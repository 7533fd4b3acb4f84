"""Launch configs: what scripts/launch/render.py renders."""
