"""The averages and what moves them."""
