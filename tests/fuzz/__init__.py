"""Any external input is a value or the parser's own error."""
