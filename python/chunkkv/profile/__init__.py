"""chunkkv profile: traces of a generation, from the recorder or from Nsight Systems, and reports on them."""
