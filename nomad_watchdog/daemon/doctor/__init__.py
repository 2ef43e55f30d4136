"""`doctor`: checks of the environment, and how to fix what they find."""
