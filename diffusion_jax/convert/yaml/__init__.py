"""YAML configs of latent-diffusion and generative-models -> a config file of this package."""
