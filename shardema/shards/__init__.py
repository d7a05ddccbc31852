"""What a rank holds: boxes of full tensors, shards, and their memory layout."""
