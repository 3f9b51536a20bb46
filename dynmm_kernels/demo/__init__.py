"""Handwritten digits, a cheap and a costly branch: the whole idea in under a minute."""
