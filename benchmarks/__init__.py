"""What the tables of the documentation were made with. Each prints its table and writes JSON."""
