"""The method's own objects, without networks or users: what everything above speaks of."""
