"""Text-to-image transformers, one short file a family; ``base`` is what they share."""
