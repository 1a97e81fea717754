"""Interactive figures; each also draws without widgets."""
