"""The policy network: its decoder, tokenizers, loading, checkpoints and export."""
