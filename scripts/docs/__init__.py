"""What the documentation's site has beyond the files in docs/; mkdocs.yml names hooks.py. Nothing of JAX is imported."""
