"""A model's files: where they lie, how they are read, and what is kept beside them."""
