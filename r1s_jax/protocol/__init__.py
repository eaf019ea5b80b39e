"""The text between a policy and a search engine, and which of them wrote each part."""
