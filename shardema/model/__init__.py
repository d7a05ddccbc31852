"""Reads a model's tensors as shards, selects those to average, and writes them."""
