"""Processes of a job: how they meet, what they tell each other outside of collectives, hangs, ends."""
