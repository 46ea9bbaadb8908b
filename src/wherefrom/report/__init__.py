"""Scores beside texts: tables, pages and what is drawn on them."""
