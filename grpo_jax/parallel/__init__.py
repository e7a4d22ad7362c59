"""Shardings over the device mesh, and many processes as one."""
