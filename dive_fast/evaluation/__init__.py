"""Runs over labelled data that are written as they go and resumed where they stopped."""
