"""Communication of the ranks that share a model: messages, plans and transfers."""
