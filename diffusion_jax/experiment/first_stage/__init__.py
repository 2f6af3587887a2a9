"""First stages: one that is trained, and a frozen one under a model of its latents."""
