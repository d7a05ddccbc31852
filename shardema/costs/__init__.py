"""What an average costs, before a run and of a live object: memory, updates, saves, exports."""
