"""Advantages from rewards alone: of groups, from tracked prompts, spread by eligibility traces; and their scaling."""
