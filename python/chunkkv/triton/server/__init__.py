"""Starts a tritonserver and watches over it."""
