"""Trainers that people start with: one file for each, which alone imports it."""
