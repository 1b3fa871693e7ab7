"""Schedules against fixed draft lengths, measured and simulated."""
