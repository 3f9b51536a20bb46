"""Two streams of stages: the auxiliary one is fused only as deep as a sample needs."""
