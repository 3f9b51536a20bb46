"""Whole branches: each sample runs the one its gate chooses."""
