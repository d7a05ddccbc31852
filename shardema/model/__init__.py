"""What is averaged of a model, read as shards, and written."""
