"""Stages in order of cost: a sample leaves after the first that is sure of it."""
