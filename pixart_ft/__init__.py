"""Fine-tune PixArt-Sigma on your own pictures, its learned variance included, and generate with the result."""

__version__ = "0.1.0"
