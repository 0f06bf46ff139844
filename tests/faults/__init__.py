"""Damaged files by the thousand: every one must end in a sentence or in an answer.

    python -m tests.faults --cases 1000
    python -m tests.faults --only coco:17 --keep /somewhere

Cases are drawn from a seed; each is one command of the command line, in a process of its own.
"""
