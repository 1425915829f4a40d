"""Turns a hang into a report: who waits for what, who diverged, who failed first."""
