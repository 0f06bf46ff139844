"""The family "geodiffusion": Stable Diffusion whose prompts hold location tokens."""
