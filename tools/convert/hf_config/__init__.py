"""Translation between a Hugging Face config.json and the `model` section, key by key, in both directions."""
