"""A PixArt-Sigma and its parts: what it says of itself, its weights, text, latents, and one call of its network."""
