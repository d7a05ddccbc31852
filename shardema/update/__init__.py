"""The averages and their updates."""
