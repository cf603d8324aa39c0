"""Results of an evaluation: records, statistics, pictures, pages."""
