"""The family "class-unet": UNets that are conditioned on class labels."""
