"""Classes as prompts, and prompts as conditions."""
