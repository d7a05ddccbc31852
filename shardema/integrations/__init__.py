"""Integrations with trainers; each library is imported in its own file only."""
