"""The ranks that share a model: what they tell each other, and what they send."""
