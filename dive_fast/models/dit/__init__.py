"""The family "dit": class-conditional diffusion transformers."""
