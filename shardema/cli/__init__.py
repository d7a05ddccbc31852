"""The command line and its plots."""
