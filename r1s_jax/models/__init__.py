"""The policy network, and how it gets in and out."""
