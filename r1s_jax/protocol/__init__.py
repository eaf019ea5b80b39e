"""The text between a policy and a search engine, and who wrote which of it."""
