"""Checkpoints and exports, written atomically, and reading them."""
