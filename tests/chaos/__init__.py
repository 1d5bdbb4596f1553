"""Faults against a whole cluster of real processes, and a checker that knows every acknowledged publication."""
