"""Measuring a policy: answer metrics and the evaluation runner."""
