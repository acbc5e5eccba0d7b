"""The board: results of many evaluations, from many people, checked and ranked."""
