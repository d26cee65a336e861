"""Proof on the user's own machine: hostile inputs, and a search for a wrong index that never stops believing in one."""
