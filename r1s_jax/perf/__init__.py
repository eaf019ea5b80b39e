"""What a step costs, measured here."""
