"""What lies on which device, and many processes as one."""
