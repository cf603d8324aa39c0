"""What was measured, and what it says: traces of a generation from the recorder or from Nsight Systems, and reports."""
