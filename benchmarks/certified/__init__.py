"""Verified accuracy of low-rank networks and of their rivals, at equal size and equal effort."""
