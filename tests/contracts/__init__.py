"""The conformance suite for plugins: import its tests, name your plugin."""
