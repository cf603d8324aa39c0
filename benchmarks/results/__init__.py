"""The results page: what compression loses on the shipped model, measured, and written as tables and pictures."""
