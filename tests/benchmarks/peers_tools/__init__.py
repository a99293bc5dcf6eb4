"""The loaders that `peers.py` compares, one file each, and what they share."""
