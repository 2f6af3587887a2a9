"""The loss, the step and the pictures of an autoencoder that trains against a discriminator."""
