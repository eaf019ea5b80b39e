"""What a step costs: measured here, or told by a compiler."""
