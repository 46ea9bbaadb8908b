"""What jobs are worth on texts: audit, poison, provenance, preferences. `run_text_jobs.py` runs them."""
