"""The method's own objects, without networks, files or users: what everything above speaks of."""
