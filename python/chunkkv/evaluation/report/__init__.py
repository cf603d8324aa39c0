"""What a user sees of a run: tables and pictures of an evaluation, and the page of chunkkv inspect."""
