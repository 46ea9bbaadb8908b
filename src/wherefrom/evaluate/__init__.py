"""Whether scores are right: retraining, removal, agreement, and plots of these."""
