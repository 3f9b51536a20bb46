"""Random models, inputs and modes against a loop over samples in plain PyTorch.

The loops (`routed_oracle`, `stacks_oracle`, `functional`) share no code with the library: they
are written from its documentation alone.
"""
