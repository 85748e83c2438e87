"""Advantages without a critic (from groups, steps, trackers or eligibility traces), and scaling by a value."""
