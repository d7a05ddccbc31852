"""The command line, and the pictures that it draws."""
