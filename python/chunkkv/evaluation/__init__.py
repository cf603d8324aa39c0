"""What a compressed cache loses: policies compared at equal kept tokens on one engine, suites of questions."""
