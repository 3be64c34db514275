"""The Megatron-Core model: its settings, layer specs, inputs, and weights by canonical name."""
