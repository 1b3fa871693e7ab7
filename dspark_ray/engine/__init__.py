"""The step loop, and what it decides with: scheduler, sequences, the record of each step, profiles."""
