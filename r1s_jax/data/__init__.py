"""Questions, environments, demonstrations, traces and files of results."""
