"""The Megatron-Core model: its settings, specs, weights by canonical name, inputs."""
