"""Bridges to other libraries; each is imported on use, none of the others is required."""
