"""What every way of scoring has to keep, whatever it computes: see `methods` for the table of them."""
