"""The prompts and questions of an evaluation: suites, generated or from files, and how answers are judged."""
