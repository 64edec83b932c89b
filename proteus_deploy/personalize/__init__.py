"""Adapters for one person, trained from one photo by rewards on generated videos (PersonalVideo)."""
