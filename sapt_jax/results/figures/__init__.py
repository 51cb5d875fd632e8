"""Figures of runs and of comparisons, drawn by matplotlib, which is imported only when something is drawn."""
