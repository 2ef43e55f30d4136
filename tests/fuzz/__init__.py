"""Whatever comes in from outside is a value or the parser's own error."""
