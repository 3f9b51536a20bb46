"""Modalities in sequence: stages in order of cost, which a sample leaves once they are sure."""
