"""A Hugging Face config.json and our model section: each key's meaning, both ways."""
