"""From a rewarded batch to better parameters."""
