"""What is known about each kind of data without learning."""
