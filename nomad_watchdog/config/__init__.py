"""The HCL file: settings, checks, and the class specs that follow from them."""
