"""The published classification loops, rewritten plainly: oracle for tests, baseline for timings.

Nothing here imports ``dive_fast``: agreement between the two is then evidence.
"""
