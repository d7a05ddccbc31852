"""Files that are whole or not there: checkpoints, exports, and reading them."""
