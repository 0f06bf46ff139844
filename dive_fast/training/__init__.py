"""Making models: one loop, and what each trainer learns."""
