"""One stream of layers: samples that skip one, and samples that leave early."""
