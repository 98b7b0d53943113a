"""Tools that several objectives share."""
